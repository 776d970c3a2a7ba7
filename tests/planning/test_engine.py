"""Plans for an inference engine: all heads read in all layers, and nothing else is given up."""

from __future__ import annotations

import pytest
import statistics_maker
from test_allocate import HEADS, LAYERS, make_profile, make_statistics

from yopo.planning.allocate import Allocator
from yopo.planning.levers import Levers
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest, PaperRequest, ToleranceRequest, plan_request
from yopo.planning.templates import Layers, TemplateBuilder
from yopo.planning.weightings import VISUAL_WEIGHTS, Weighting
from yopo.plans.servable import engine_problem, layers_problem
from yopo.strategies.neighbors import PAPER_RADIUS
from yopo.support.errors import PlanError


def allocated(budget: float, weight: float, kv_heads: int, *, everywhere: bool) -> Layers | None:
    statistics = make_statistics(kv_heads)
    weighting = Weighting.even(weight, PAPER_RADIUS, LAYERS)
    builder = TemplateBuilder(statistics, budget)
    levers = Levers(everywhere=everywhere)
    return Allocator(builder, make_profile(statistics), weighting, levers).allocate()


@pytest.mark.parametrize("kv_heads", [HEADS, HEADS // 2])
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.12])
@pytest.mark.parametrize("weight", VISUAL_WEIGHTS[::3])
def test_allocations_can_be_served(budget: float, weight: float, kv_heads: int) -> None:
    layers = allocated(budget, weight, kv_heads, everywhere=True)
    assert layers is not None
    shape = make_statistics(kv_heads).model.shape
    assert layers_problem(layers, shape) is None
    cost = TemplateBuilder(make_statistics(kv_heads), budget).cost(layers)
    assert 0.6 * budget < cost <= budget  # steps are coarse here


def test_without_an_engine_some_allocations_cannot() -> None:
    layers = allocated(0.12, 1.0, HEADS, everywhere=False)
    assert layers is not None
    assert layers_problem(layers, make_statistics().model.shape) is not None


def test_a_budget_that_cannot_read_everywhere_gives_nothing() -> None:
    assert allocated(0.001, 1.0, HEADS, everywhere=True) is None


def test_templates_are_only_those_that_can_be_served() -> None:
    statistics = statistics_maker.make(0, layers=LAYERS, heads=HEADS, kv_heads=HEADS)
    request = BudgetRequest(0.5, engine="vllm")
    plan, candidates = make_plan(statistics, request, measure=lambda plan: plan.budget.reached)
    assert candidates and all(engine_problem(each.plan) is None for each in candidates)
    assert plan.provenance["engine"] == "vllm"


def test_a_budget_too_small_to_read_everywhere_says_what_that_costs() -> None:
    statistics = make_statistics()
    with pytest.raises(PlanError, match="one layer that reads the image costs"):
        make_plan(statistics, BudgetRequest(0.001), measure=lambda plan: 0.0)
    builder = TemplateBuilder(statistics, 1.0)
    least = builder.cost((builder.reader_layer,) * LAYERS)
    with pytest.raises(PlanError, match=f"all layers, as vllm requires, costs {least:.4f}"):
        make_plan(statistics, BudgetRequest(0.001, engine="vllm"), measure=lambda plan: 0.0)


def test_a_shape_that_cannot_be_served_is_refused() -> None:
    statistics = make_statistics()
    with pytest.raises(PlanError, match="cannot be served in vllm: in layer 1 .* may not read"):
        make_plan(statistics, PaperRequest(head_ratio=0.5, engine="vllm"))
    plan, _ = make_plan(statistics, PaperRequest(neuron_ratio=0.5, engine="vllm"))
    assert engine_problem(plan) is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"engine": "vlm"}, "Unknown engine 'vlm'"),
        ({"engine": "vllm", "bidirectional": True}, "engine and bidirectional"),
        ({"engine": "vllm", "budget": 0.2, "kv_budget": 0.5}, "engine and kv_budget"),
        ({"engine": "vllm", "tolerance": 0.1, "kv_budget": 0.5}, "engine and kv_budget"),
    ],
)
def test_what_excludes_an_engine(options: dict[str, object], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        plan_request(**options)


def test_a_tolerance_asks_for_the_engine_at_every_budget() -> None:
    assert ToleranceRequest(0.1, engine="vllm").at(0.2).engine == "vllm"
