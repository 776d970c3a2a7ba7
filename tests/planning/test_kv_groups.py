"""Under GQA, either whole KV groups are dropped, which frees cache, or single query heads.

A KV head's visual keys and values exist as long as one of its query heads reads.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import statistics_maker
import torch
from hypothesis import given
from hypothesis import strategies as st

from yopo.calibration.statistics import Statistics
from yopo.planning.planner import make_plan
from yopo.planning.request import plan_request
from yopo.planning.templates import TEMPLATES, TemplateBuilder
from yopo.plans.flops import visual_budget, visual_kv_bytes
from yopo.plans.schema import PruningPlan
from yopo.strategies.heads import select_top, select_vote

GROUP = 4


@pytest.fixture(scope="module")
def spread() -> Statistics:
    """Make statistics in which one query head per KV group reads much and the others little."""
    statistics = statistics_maker.make(kv_heads=8 // GROUP)
    rho = 0.1 * statistics.rho
    rho[:, :, ::GROUP] += 1.0
    return replace(statistics, rho=rho)


def plan_of(statistics: Statistics, **asked: object) -> PruningPlan:
    return make_plan(statistics, plan_request(**asked))[0]


def is_whole(plan: PruningPlan) -> bool:
    shape = plan.model.shape
    return all(
        len(each.read_heads) == shape.group * len(each.kept_kv(shape)) for each in plan.layers
    )


@pytest.mark.parametrize("asked", [{"head_ratio": 0.5}, {"preset": "yopo-25"}, {"alpha": 0.6}])
def test_kv_groups_are_kept_whole_on_request(spread: Statistics, asked: dict) -> None:
    whole, single = (plan_of(spread, kv_groups=each, **asked) for each in (True, False))
    assert is_whole(whole) and not is_whole(single)
    assert whole.provenance["kv_groups"] is True and "kv_groups" not in single.provenance


def test_the_cache_shrinks_with_groups_and_not_with_single_heads(spread: Statistics) -> None:
    dense = visual_kv_bytes(plan_of(spread, head_ratio=1.0))
    single = plan_of(spread, head_ratio=0.5)
    grouped = plan_of(spread, head_ratio=0.5, kv_groups=True)
    kept = [sum(len(layer.read_heads) for layer in plan.layers) for plan in (single, grouped)]
    assert kept[0] == kept[1] == 8 * 8 // 2
    assert visual_kv_bytes(single) == dense  # every group still has its reader
    assert visual_kv_bytes(grouped) == dense // 2
    assert visual_budget(grouped) < visual_budget(single) < 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_at_a_budget_keeps_whole_groups(spread: Statistics, name: str) -> None:
    layers = TemplateBuilder(spread, 0.3, groups=GROUP).build(name)
    if layers is None:
        pytest.skip("the smallest form of this template exceeds the budget")
    plan = replace(plan_of(spread, head_ratio=1.0), layers=layers)
    assert is_whole(plan) and visual_budget(plan) <= 0.3


def test_a_budget_is_met_with_whole_groups(spread: Statistics) -> None:
    for template in ("paper", "reader-heads"):
        plan = plan_of(spread, budget=0.3, template=template, kv_groups=True)
        assert is_whole(plan) and 0.2 < plan.budget.reached <= 0.3


def test_without_groups_nothing_changes_for_multi_head_attention() -> None:
    statistics = statistics_maker.make(kv_heads=8)
    for asked in ({"head_ratio": 0.5}, {"budget": 0.3, "template": "paper"}):
        found, usual = (plan_of(statistics, kv_groups=each, **asked) for each in (True, False))
        assert found.layers == usual.layers


@given(seed=st.integers(0, 999), alpha=st.floats(0.0, 1.0))
def test_a_vote_keeps_a_group_that_holds_an_active_head(seed: int, alpha: float) -> None:
    rho = torch.rand(5, 4, 8, generator=torch.Generator().manual_seed(seed))
    single, grouped = (select_vote(rho, alpha, groups=each) for each in (1, GROUP))
    expected = single.reshape(4, 2, GROUP).any(dim=2)
    assert torch.equal(grouped.reshape(4, 2, GROUP).all(dim=2), expected)
    assert torch.equal(grouped.reshape(4, 2, GROUP).any(dim=2), expected)


@given(seed=st.integers(0, 999), count=st.integers(0, 32))
def test_the_best_groups_are_those_with_the_best_heads(seed: int, count: int) -> None:
    scores = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed))
    keep = select_top(scores, count, groups=GROUP)
    assert keep.sum() == GROUP * round(count / GROUP)
    best = scores.reshape(-1, GROUP).amax(dim=1)
    kept = keep.reshape(-1, GROUP).all(dim=1)
    if kept.any() and not kept.all():
        assert best[kept].min() >= best[~kept].max()
