"""Plans from statistics keep budgets, presets are the paper's shapes, and choices are measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import statistics_maker
import torch
from hypothesis import given
from hypothesis import strategies as st

from yopo.calibration.statistics import Statistics
from yopo.planning.planner import make_plan
from yopo.planning.request import PRESETS, BudgetRequest, PaperRequest
from yopo.planning.templates import TEMPLATES, TemplateBuilder, random_rho, trim
from yopo.plans.file import parse_plan
from yopo.plans.flops import visual_budget
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelIdentity, ModelShape, PruningPlan, Workload
from yopo.plans.storage import plan_files
from yopo.support.errors import PlanError

NAMES = ("plan.yaml", "plan.safetensors")


@pytest.fixture(scope="module", params=[8, 2], ids=["mha", "gqa"])
def statistics(request: pytest.FixtureRequest) -> Statistics:
    return statistics_maker.make(kv_heads=request.param)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("budget", [0.02, 0.05, 0.12, 0.25, 0.5, 0.9, 1.0])
def test_every_template_keeps_its_budget(statistics: Statistics, name: str, budget: float) -> None:
    builder = TemplateBuilder(statistics, budget)
    layers = builder.build(name)
    if layers is None:
        pytest.skip("the smallest form of this template exceeds the budget")
    assert builder.cost(layers) <= budget
    assert len(layers) == statistics.model.shape.layers
    assert layers == trim(layers)


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_templates_use_their_budget(budget: float) -> None:
    builder = TemplateBuilder(statistics_maker.make(), budget)
    reached = {name: builder.cost(layers) for name, layers in builder.candidates()}
    assert len(reached) >= 6
    assert min(reached.values()) > 0.9 * budget, reached


@pytest.mark.parametrize(("preset", "expected"), [("yopo-25", 0.245), ("yopo-12", 0.123)])
def test_presets_are_the_papers_shapes_on_llava_7b(preset: str, expected: float) -> None:
    small = statistics_maker.make(layers=32, heads=32, kv_heads=32)
    shape = ModelShape(32, 4096, 32, 32, 128, 11008)
    model = ModelIdentity("llava-1.5-7b", "llava", shape, "f")
    wide = torch.rand(32, 11008, dtype=torch.float64)
    statistics = replace(
        small,
        model=model,
        workload=Workload((Grid(24, 24),), 64, 35),
        neuron_square=wide,
        neuron_sum=wide,
        down_norm=wide,
    )
    plan, _ = make_plan(statistics, PaperRequest(preset=preset))
    assert visual_budget(plan) == pytest.approx(expected, abs=5e-4)
    assert plan.visual_depth == 16
    kept = sum(len(layer.read_heads) for layer in plan.layers)
    assert kept == 16 * 32 * PRESETS[preset]["head_ratio"]
    assert len(plan.layers[0].read_heads) == len(plan.layers[1].read_heads) == 32


def test_heads_are_kept_by_activity(statistics: Statistics) -> None:
    plan, _ = make_plan(statistics, PaperRequest(head_ratio=0.5, visual_layers=3))
    mean = statistics.rho.mean(dim=0)[:3]
    kept = torch.zeros_like(mean, dtype=torch.bool)
    for index, layer in enumerate(plan.layers[:3]):
        kept[index, list(layer.read_heads)] = True
    whole = kept.all(dim=1)
    assert mean[kept & ~whole[:, None]].min() >= mean[~kept].max()
    assert plan.visual_depth == 3


def test_the_vote_follows_the_authors_rule(statistics: Statistics) -> None:
    plan, _ = make_plan(statistics, PaperRequest(alpha=0.5))
    votes = (statistics.rho > 0.5).float().mean(dim=0)
    for index, layer in enumerate(plan.layers):
        expected = range(8) if index < 2 else [h for h in range(8) if votes[index, h] > 0.4]
        assert list(layer.read_heads) == list(expected)


def test_the_best_measured_plan_wins_and_all_are_recorded(statistics: Statistics) -> None:
    def measure(plan: PruningPlan) -> float:
        frozen = sum(not layer.attend_heads for layer in plan.layers)
        return abs(frozen - 3) + (plan.compensation == "none") / 2

    plan, candidates = make_plan(statistics, BudgetRequest(0.4), measure)
    assert [each.kl for each in candidates] == sorted(each.kl for each in candidates)
    assert plan.layers == candidates[0].plan.layers
    assert plan.provenance["template"] == candidates[0].template
    assert len(plan.provenance["candidates"]) == len(candidates) > 8
    assert plan.budget.asked == 0.4 and plan.budget.reached == visual_budget(plan) <= 0.4


def test_without_a_model_a_budget_uses_the_named_template(statistics: Statistics) -> None:
    plan, candidates = make_plan(statistics, BudgetRequest(0.3, template="withdraw"))
    assert plan.provenance["template"] == "withdraw" and len(candidates) == 1
    assert candidates[0].kl is None


@given(seed=st.integers(0, 99), budget=st.floats(0.05, 1.0))
def test_same_inputs_give_the_same_bytes(seed: int, budget: float) -> None:
    first, _ = make_plan(statistics_maker.make(seed), BudgetRequest(budget))
    again, _ = make_plan(statistics_maker.make(seed), BudgetRequest(budget))
    assert plan_files(first, *NAMES) == plan_files(again, *NAMES)
    text = plan_files(first, *NAMES)["plan.yaml"].decode()
    assert parse_plan("plan.yaml", text)[0].layers == first.layers


def test_random_scores_change_the_selection_but_not_the_shape() -> None:
    statistics = statistics_maker.make()
    usual, _ = make_plan(statistics, PaperRequest(preset="yopo-25"))
    other, _ = make_plan(random_rho(statistics, 1), PaperRequest(preset="yopo-25"))
    assert usual.budget.reached == pytest.approx(other.budget.reached, abs=1e-9)
    assert [layer.read_heads for layer in usual.layers] != [
        layer.read_heads for layer in other.layers
    ]


def test_requests_that_do_not_fit_the_model_are_refused(statistics: Statistics) -> None:
    with pytest.raises(PlanError, match="the model has 8 layers"):
        make_plan(statistics, PaperRequest(visual_layers=9))
    with pytest.raises(PlanError, match="fits a visual budget of 0.0001"):
        make_plan(statistics, BudgetRequest(0.0001))
    with pytest.raises(PlanError, match="Did you mean 'reader"):
        make_plan(statistics, BudgetRequest(0.3, template="readr"))
