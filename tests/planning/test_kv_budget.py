"""Every planner keeps a budget of KV bytes in addition to one of FLOPs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_allocate import LAYERS, damage, make_allocator, make_profile, make_statistics

from yopo.calibration.statistics import Statistics
from yopo.planning.allocate import Allocator
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest
from yopo.planning.templates import TEMPLATES, TemplateBuilder
from yopo.planning.weightings import Weighting
from yopo.plans.file import to_yaml
from yopo.plans.flops import dense_visual_kv_bytes, visual_budget, visual_kv_bytes
from yopo.plans.schema import PruningPlan
from yopo.support.errors import PlanError

SHARES = (0.1, 0.25, 0.5, 0.75)


def limited(kv_budget: float, kv_heads: int, budget: float = 0.3) -> Allocator:
    statistics = make_statistics(kv_heads)
    builder = TemplateBuilder(statistics, budget, kv_budget=kv_budget)
    return Allocator(builder, make_profile(statistics), Weighting.even(1.0, None, LAYERS))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_allocations_keep_both_budgets_and_spend_the_scarce_one(kv_heads: int) -> None:
    free = make_allocator(0.3, kv_heads=kv_heads)
    assert free.builder.kv_share(free.allocate()) > max(SHARES)  # else nothing is limited below
    spoiled = []
    for share in SHARES:
        allocator = limited(share, kv_heads)
        layers = allocator.allocate()
        group = 1 / (LAYERS * kv_heads)
        assert share - 2 * group < allocator.builder.kv_share(layers) <= share
        assert allocator.builder.cost(layers) <= 0.3
        spoiled.append(damage(layers, allocator))
    assert spoiled == sorted(spoiled, reverse=True)  # more cache, less damage
    assert limited(1.0, kv_heads).allocate() == free.allocate()


def test_a_kv_budget_below_one_head_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = 1 / (LAYERS * 4)
    kept = limited(1.001 * one, 4).allocate()
    assert sum(bool(layer.read_heads) for layer in kept) == 1
    allocator = limited(0.999 * one, 4)
    monkeypatch.setattr(allocator, "_layers", None)  # no price is tried
    assert allocator.allocate() is None


def test_the_remaining_heads_are_those_that_read_most() -> None:
    """If only reading matters, a KV budget is a threshold on the value of reading."""
    statistics = make_statistics()
    profile = make_profile(statistics)
    profile.mixing.zero_(), profile.nonlinear_residual.zero_(), profile.map_residual.zero_()
    builder = TemplateBuilder(statistics, 1.0, kv_budget=0.5)
    layers = Allocator(builder, profile, Weighting.even(1.0, None, LAYERS)).allocate()
    effect = statistics.head_effect
    kept = torch.zeros_like(effect, dtype=torch.bool)
    for number, layer in enumerate(layers):
        kept[number, list(layer.read_heads)] = True
    assert kept.sum() == effect.numel() // 2
    assert effect[kept].min() > effect[~kept].max()


@pytest.mark.parametrize("share", SHARES)
def test_templates_keep_the_kv_budget(share: float) -> None:
    builder = TemplateBuilder(make_statistics(), 0.4, kv_budget=share)
    found = dict(builder.candidates())
    expected = {"reader-heads", "paper"}
    if share >= 1 / LAYERS:  # these read with all heads of a layer
        expected |= {"reader", "reader-prefix"}
    assert expected <= set(found) <= set(TEMPLATES)
    for layers in found.values():
        assert builder.cost(layers) <= 0.4 and builder.kv_share(layers) <= share


@pytest.mark.parametrize("search", [None, 20])
def test_candidates_and_searched_plans_keep_the_kv_budget(search: int | None) -> None:
    seen: list[PruningPlan] = []

    def measure(plan: PruningPlan) -> float:
        seen.append(plan)
        return 1 / (1 + sum(len(layer.read_heads) for layer in plan.layers))

    request = BudgetRequest(0.4, kv_budget=0.3, search=search)
    plan, _ = make_plan(make_statistics(2), request, measure)
    assert plan.provenance["kv_budget"] == 0.3
    for each in (plan, *seen):
        dense = dense_visual_kv_bytes(each.model.shape, each.workload)
        assert visual_kv_bytes(each) <= 0.3 * dense and visual_budget(each) <= 0.4


def test_an_impossible_kv_budget_is_refused() -> None:
    with pytest.raises(PlanError, match=r"a KV budget of 0.01: one layer .* caches 0.1667"):
        make_plan(make_statistics(), BudgetRequest(0.5, kv_budget=0.01, template="reader"))


# Storages, where calibration has measured the keys.


def with_keys(kv_heads: int = 4) -> Statistics:
    statistics = make_statistics(kv_heads)
    return replace(statistics, key_square_sum=torch.ones_like(statistics.key_square_sum))


def bits_of(plan: PruningPlan) -> set[tuple[int | None, int | None]]:
    return {(layer.key_bits, layer.value_bits) for layer in plan.layers if layer.read_heads}


def kv_share(plan: PruningPlan) -> float:
    return visual_kv_bytes(plan) / dense_visual_kv_bytes(plan.model.shape, plan.workload)


@pytest.mark.parametrize(
    ("kv_budget", "bits"),
    [(1.0, (None, None)), (0.6, (8, 8)), (0.45, (8, 4)), (0.33, (4, 4)), (0.26, (4, 2))],
)
def test_without_a_model_the_finest_storage_that_drops_no_head(
    kv_budget: float, bits: tuple[int | None, int | None]
) -> None:
    plan, _ = make_plan(with_keys(), BudgetRequest(1.0, kv_budget=kv_budget, template="reader"))
    assert bits_of(plan) == {bits}
    assert all(len(layer.read_heads) == 4 for layer in plan.layers)
    assert kv_share(plan) <= kv_budget
    assert (plan.tensors.key_scale is None) == (bits == (None, None))


def test_heads_are_dropped_only_beyond_the_coarsest_storage() -> None:
    plan, _ = make_plan(with_keys(), BudgetRequest(1.0, kv_budget=0.1, template="reader-heads"))
    assert bits_of(plan) == {(2, 2)} and 0.08 < kv_share(plan) <= 0.1
    assert 0 < sum(len(layer.read_heads) for layer in plan.layers) < 4 * LAYERS


def test_without_a_kv_budget_nothing_is_stored_in_few_bits() -> None:
    made = [
        make_plan(each, BudgetRequest(0.4), lambda plan: plan.budget.reached)[0]
        for each in (make_statistics(), with_keys())
    ]
    assert made[0] == made[1] and "bits" not in to_yaml(made[1])


def test_finer_storages_are_measured_until_one_is_no_better() -> None:
    """Finer in the layers that read most, then everywhere with ever more heads dropped."""

    def measure(plan: PruningPlan) -> float:
        heads = sum(len(layer.read_heads) for layer in plan.layers)
        coarse = sum(layer.value_bits == 2 for layer in plan.layers)
        return 1.0 / (1 + heads) + 0.001 * coarse

    request = BudgetRequest(1.0, kv_budget=0.27, template="reader", compensation="none")
    plan, found = make_plan(with_keys(), request, measure)
    names = [each.template for each in found]
    assert names == [
        "reader, keys in 4 bits, values in 2 bits and finer",
        "reader",
        "reader, keys in 4 bits, values in 4 bits",
    ]
    assert bits_of(plan) == {(4, 2), (4, 4)} and 0.25 < kv_share(plan) <= 0.27
    finer = [layer.value_bits == 4 for layer in plan.layers]
    worth = with_keys().reading.sum(dim=1)
    assert worth[torch.tensor(finer)].min() >= worth[~torch.tensor(finer)].max()
    for each in found:
        assert kv_share(each.plan) <= 0.27


def test_a_search_keeps_the_storage_and_the_budget() -> None:
    def measure(plan: PruningPlan) -> float:
        return 1 / (1 + sum(len(layer.read_heads) for layer in plan.layers))

    request = BudgetRequest(0.4, kv_budget=0.2, search=10)
    plan, found = make_plan(with_keys(2), request, measure)
    assert any(layer.key_bits for layer in plan.layers)
    assert all(kv_share(each.plan) <= 0.2 for each in found)
