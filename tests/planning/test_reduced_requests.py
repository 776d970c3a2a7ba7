"""Plans from statistics of reduced tokens: they fit, carry the reduction, and refuse neighbors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import statistics_maker

from yopo.calibration.statistics import Statistics
from yopo.calibration.statistics_file import load_statistics
from yopo.pipeline.commands import calibrate, calibrate_front, plan
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest, LatencyRequest, PaperRequest, PlanRequest
from yopo.planning.templates import NEARBY, TEMPLATES, TemplateBuilder
from yopo.plans.flops import visual_budget, visual_kv_bytes
from yopo.reduction.registry import make_method
from yopo.support.errors import DataError, ModelError, PlanError

HALF = make_method("par", 0.5)


@pytest.fixture
def reduced() -> Statistics:
    return replace(statistics_maker.make(), reduction=HALF)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in NEARBY])
def test_templates_fill_what_the_reduction_leaves(reduced: Statistics, name: str) -> None:
    for budget in (0.3, 0.15):
        found = plan(reduced, BudgetRequest(budget, template=name)).plan
        assert found.reduction == HALF and found.seen.visual == 32
        assert visual_budget(found) == found.budget.reached <= budget
        assert visual_budget(found) > 0.9 * budget


def test_a_budget_of_kv_bytes_counts_the_tokens_that_are_left(reduced: Statistics) -> None:
    request = BudgetRequest(0.3, template="reader-heads", kv_budget=0.2)
    whole = plan(replace(reduced, reduction=None), request).plan
    found = plan(reduced, request).plan
    dense = 2 * 8 * 8 * 16 * 64 * 2
    assert 0.15 < visual_kv_bytes(found) / dense <= 0.2
    assert sum(len(each.read_heads) for each in found.layers) > sum(
        len(each.read_heads) for each in whole.layers
    )


def test_templates_with_neighborhoods_are_left_out(reduced: Statistics) -> None:
    for name in NEARBY:
        layers = TemplateBuilder(replace(reduced, reduction=None), 0.7).candidate(name)
        assert layers is not None and any(each.radius is not None for each in layers)
    names = [name for name, _ in TemplateBuilder(reduced, 0.7).candidates()]
    assert names and not set(names) & set(NEARBY)


def test_a_search_moves_without_neighborhoods(reduced: Statistics) -> None:
    request = BudgetRequest(0.3, template="withdraw", search=12, compensation="none")
    found, _ = make_plan(reduced, request, lambda plan: len(plan.layers[0].attend_heads))
    assert found.reduction == HALF and all(each.radius is None for each in found.layers)


REFUSED: dict[str, tuple[PlanRequest, str]] = {
    "preset": (PaperRequest(preset="yopo-25"), "A radius of 2 needs the neighbors"),
    "radius": (PaperRequest(radius=3), "A radius of 3 needs the neighbors"),
    "template": (BudgetRequest(0.3, template="thin"), "Template thin needs the neighbors"),
    "engine": (BudgetRequest(0.3, engine="vllm"), r"\(par\) cannot be served in vllm"),
    "time": (LatencyRequest(3.0, "c.json", template="attend"), "Template attend needs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_all_tokens_is_refused_before_anything_runs(case: str) -> None:
    request, problem = REFUSED[case]
    with pytest.raises(PlanError, match=problem):
        calibrate("no-such-model", request, fit_options=FitOptions(reduction=HALF))


def test_it_is_refused_for_each_of_several_budgets_and_without_a_model(
    reduced: Statistics,
) -> None:
    request = BudgetRequest(0.3, template="light")
    with pytest.raises(PlanError, match="Template light needs"):
        list(calibrate_front("none", [request], fit_options=FitOptions(reduction=HALF)))
    with pytest.raises(PlanError, match="Template light needs"):
        plan(reduced, request)


def test_methods_without_their_input_are_refused() -> None:
    options = FitOptions(reduction=make_method("scope", 0.5))
    with pytest.raises(ModelError, match="qwen2_vl with the tower 'qwen2_vl_vision' has none"):
        calibrate("qwen2-vl-tiny", 0.3, options=RunOptions(samples=8), fit_options=options)


def test_a_reduction_that_costs_the_budget_says_so(reduced: Statistics) -> None:
    with pytest.raises(PlanError, match=r"the reduction alone costs 0\.0"):
        plan(reduced, BudgetRequest(0.001))


def test_the_papers_shape_without_a_radius_is_possible(reduced: Statistics) -> None:
    found = plan(reduced, PaperRequest(head_ratio=0.5, visual_layers=4)).plan
    assert found.reduction == HALF
    assert (
        found.budget.reached
        < plan(
            replace(reduced, reduction=None), PaperRequest(head_ratio=0.5, visual_layers=4)
        ).plan.budget.reached
    )


def test_statistics_keep_the_reduction_in_their_file(reduced: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(reduced.to_bytes())
    assert load_statistics(path).reduction == HALF
    path.write_bytes(replace(reduced, reduction=None).to_bytes())
    assert load_statistics(path).reduction is None
    path.write_bytes(reduced.to_bytes().replace(b'\\"par\\"', b'\\"pra\\"'))
    with pytest.raises(DataError, match="is damaged: Unknown reduction 'pra'"):
        load_statistics(path)


def test_other_reductions_are_not_merged(reduced: Statistics) -> None:
    assert reduced.merge(reduced).reduction == HALF
    for other in (None, make_method("par", 0.25), make_method("divprune", 0.5)):
        with pytest.raises(DataError, match="different reductions"):
            reduced.merge(replace(reduced, reduction=other))
