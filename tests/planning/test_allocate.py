"""Allocations keep and spend their budget, keep KV groups whole and do no unread work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
import statistics_maker
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from yopo.calibration.statistics import Statistics
from yopo.fitting.profile import Profile
from yopo.planning import planner
from yopo.planning.allocate import Allocator, read_later
from yopo.planning.candidate import Candidate
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest, PaperRequest
from yopo.planning.templates import Layers, TemplateBuilder, trim
from yopo.planning.weightings import NEAR, SPREAD, VISUAL_WEIGHTS, Weighting, near
from yopo.plans.flops import visual_budget, visual_flops_of_layer
from yopo.plans.schema import LayerPlan, PruningPlan, full_layer
from yopo.strategies.neighbors import PAPER_RADIUS
from yopo.support.errors import PlanError

LAYERS, HEADS = 6, 4


def make_profile(statistics: Statistics, seed: int = 0) -> Profile:
    """Random energies of the right shapes: those of bottlenecks fall from 1 to 0, of maps to what
    no map of any rank explains."""
    shape, generator = statistics.model.shape, torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    def falling(rows: int) -> torch.Tensor:
        steps = draw(rows, shape.hidden) ** 4
        kept = torch.cat([torch.zeros(rows, 1).double(), steps.cumsum(dim=1)], dim=1)
        return 1 - kept / kept[:, -1:]

    nonlinear = draw(shape.layers) * 0.1
    by_rank = nonlinear[:, None] + draw(shape.layers)[:, None] * falling(shape.layers)
    mixing = draw(shape.layers, shape.heads) * 0.1
    stream = (1 + draw(shape.layers + 1)).cumprod(dim=0)  # it grows
    return Profile(mixing, falling(shape.layers), by_rank, nonlinear, stream)


def make_statistics(kv_heads: int = HEADS, seed: int = 0) -> Statistics:
    return statistics_maker.make(seed, layers=LAYERS, heads=HEADS, kv_heads=kv_heads)


def make_allocator(
    budget: float, visual_weight: float = 1.0, *, kv_heads: int = HEADS, radius: int | None = None
) -> Allocator:
    statistics = make_statistics(kv_heads)
    weighting = Weighting.even(visual_weight, radius, LAYERS)
    return Allocator(TemplateBuilder(statistics, budget), make_profile(statistics), weighting)


def damage(layers: Layers, allocator: Allocator) -> float:
    """Compute the estimate independently, following the module's docstring."""
    statistics, profile = allocator.builder.statistics, allocator.profile
    shape, visual_weight = statistics.model.shape, weight_of(allocator)
    reading, stream = reading_of(statistics), profile.stream
    total = 0.0
    for number, layer in enumerate(layers):
        seen = [
            reading[reader].sum() * stream[number + 1] / stream[reader]
            for reader in range(number + 1, shape.layers)
        ]
        later = visual_weight * float(sum(seen))
        rank = shape.hidden if layer.qkv_rank is None else layer.qkv_rank
        missed = float(profile.bottleneck_residual[number][rank])
        for head in range(shape.heads):
            whole = float(reading[number, head])
            total += whole * missed if head in layer.read_heads else whole
            mixed = later * float(profile.mixing[number, head])
            total += mixed * missed if head in layer.attend_heads else mixed
        ranked = statistics.importance[number].sort(descending=True).values
        share = float(ranked[: layer.neurons].sum() / ranked.sum())
        nonlinear = float(profile.nonlinear_residual[number])
        straight = max(float(profile.map_residual[number, layer.map_rank]) - nonlinear, 0.0)
        total += later * (1 - share) * (nonlinear + straight)
    return total


def weight_of(allocator: Allocator) -> float:
    """Return the allocator's visual weight: ``later`` is that times what the last layer reads."""
    reading = reading_of(allocator.builder.statistics)[-1].sum()
    return float(allocator.later[-2] / reading)


def reading_of(statistics: Statistics) -> torch.Tensor:
    """(layers, heads) effects of reading over the text's stream after the layer."""
    effects, before = statistics.head_effect_sum, statistics.text_norm_sum
    rows = []
    for number in range(LAYERS):
        is_last = number == LAYERS - 1
        after = before[-1] + effects[-1].sum() if is_last else before[number + 1]
        rows.append((effects[number] / after).clamp(max=1))
    return torch.stack(rows)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("visual_weight", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("radius", [None, 1])
def test_budgets_are_kept_and_spent(
    kv_heads: int, visual_weight: float, radius: int | None
) -> None:
    reached = []
    for budget in (0.02, 0.05, 0.12, 0.25, 0.5, 0.75, 1.0):
        allocator = make_allocator(budget, visual_weight, kv_heads=kv_heads, radius=radius)
        layers = allocator.allocate()
        if visual_weight > 1 and layers is None:
            continue  # visual states may matter more than reading them
        cost = allocator.builder.cost(layers)
        assert cost <= budget and len(layers) == LAYERS and layers == trim(layers)
        reached.append(cost / budget)
        for layer in layers:
            assert layer.radius in ((None, radius) if layer.attend_heads else (None,))
            assert not (layer.map_rank and layer.neurons == allocator.shape.ffn)
            groups = len(layer.kept_kv(allocator.shape))
            assert len(layer.read_heads) == groups * allocator.shape.group  # whole ones
    assert len(reached) >= 4 and min(reached[:4]) > 0.8 and min(reached) > 0.5, reached


@settings(max_examples=25)
@given(
    first=st.floats(0.02, 1.0),
    second=st.floats(0.02, 1.0),
    visual_weight=st.sampled_from([0.1, 1, 2]),
)
def test_a_larger_budget_never_means_more_damage(
    first: float, second: float, visual_weight: float
) -> None:
    allocators = [make_allocator(budget, visual_weight) for budget in sorted((first, second))]
    layers = [each.allocate() for each in allocators]
    assume(None not in layers)  # visual states may matter more than reading them
    less, more = (damage(each, by) for each, by in zip(layers, allocators, strict=True))
    assert more <= less * (1 + 1e-9) + 1e-12


def test_no_single_change_improves_an_allocation() -> None:
    """By the estimate, no random other layer at the same or lower cost beats the allocation."""
    allocator = make_allocator(0.3)
    layers = allocator.allocate()
    cost, best = allocator.builder.cost(layers), damage(layers, allocator)
    assert allocator.damage(layers) == pytest.approx(best)
    generator = torch.Generator().manual_seed(0)
    tried = 0
    for _ in range(400):
        number = int(torch.randint(LAYERS, (), generator=generator))
        choices = allocator._ffn_choices[number]
        work = choices[int(torch.randint(len(choices), (), generator=generator))].layer
        other = replace(layers[number], neurons=work.neurons, map_rank=work.map_rank)
        changed = (*layers[:number], other, *layers[number + 1 :])
        if allocator.builder.cost(changed) <= cost:
            tried += 1
            assert damage(changed, allocator) >= best * (1 - 1e-9)
    assert tried > 50


def test_a_tiny_visual_weight_reads_and_a_huge_one_computes() -> None:
    allocators = [make_allocator(0.1, weight) for weight in (1e-6, 30.0)]
    reads, computes = (each.allocate() for each in allocators)
    only = tuple(
        replace(layer, attend_heads=(), radius=None, neurons=0, map_rank=0) for layer in reads
    )
    cost = allocators[0].builder.cost
    assert cost(only) > 0.9 * cost(reads)  # the rest did not suffice to read more
    assert any(layer.attend_heads for layer in computes)
    assert any(layer.has_ffn for layer in computes)
    heads = [sum(len(layer.read_heads) for layer in layers) for layers in (reads, computes)]
    assert heads[1] < heads[0]


def test_the_scale_of_the_embeddings_does_not_matter() -> None:
    """However much a first layer raises small embeddings, later layers read the same."""
    statistics = make_statistics()
    profile, first = make_profile(statistics), torch.tensor([1e-4] + [1.0] * LAYERS).double()
    small = replace(statistics, text_norm_sum=statistics.text_norm_sum * first[:-1])
    weighting = Weighting.even(1.0, None, LAYERS)
    usual, scaled = (
        Allocator(TemplateBuilder(measured, 0.1), seen, weighting).allocate()
        for measured, seen in (
            (statistics, profile),
            (small, replace(profile, stream=profile.stream * first)),
        )
    )
    assert usual == scaled


def test_an_error_counts_less_where_the_stream_has_grown() -> None:
    reading = torch.tensor([5.0, 2.0, 3.0]).double()
    found = read_later(reading, torch.tensor([1.0, 10.0, 20.0, 7.0]).double())
    assert found.tolist() == pytest.approx([2 + 3 / 2, 3, 0])


def test_the_full_budget_keeps_everything_that_is_read() -> None:
    """A budget of 1 prunes only work that no later layer reads."""
    allocator = make_allocator(1.0)
    layers = allocator.allocate()
    assert all(len(layer.read_heads) == HEADS and layer.qkv_rank is None for layer in layers)
    assert all(layer.is_full(allocator.shape) for layer in layers[:-1])
    assert not layers[-1].attend_heads and not layers[-1].has_ffn


def test_there_is_no_allocation_if_nothing_fits() -> None:
    assert make_allocator(1e-6).allocate() is None
    statistics = make_statistics()
    unread = replace(statistics, head_effect_sum=torch.zeros_like(statistics.head_effect_sum))
    weighting = Weighting.even(1.0, None, LAYERS)
    builder = TemplateBuilder(unread, 0.5)
    assert Allocator(builder, make_profile(unread), weighting).allocate() is None


def test_unread_layers_do_nothing_at_the_end() -> None:
    """``trim`` removes maps too: nothing after the last reading layer is read."""
    reader = LayerPlan((0, 1), (0, 1), 2, 7, qkv_rank=3, map_rank=2)
    trimmed = trim((reader, reader, LayerPlan((), (), None, 5, map_rank=2)))
    assert trimmed == (
        reader,
        LayerPlan((0, 1), (), None, 0, qkv_rank=3),
        LayerPlan((), (), None, 0),
    )


def test_weights_of_single_layers_are_respected() -> None:
    statistics = make_statistics()
    profile, builder = make_profile(statistics), TemplateBuilder(statistics, 0.1)
    even = Weighting.even(1.0, None, LAYERS)
    favoured = replace(even, reading=(1e-3,) * 2 + (1e3,) + (1e-3,) * (LAYERS - 3))
    layers = Allocator(builder, profile, favoured).allocate()
    assert len(layers[2].read_heads) == HEADS
    usual = Allocator(builder, profile, even).allocate()
    assert layers != usual


def test_a_variation_changes_every_factor_and_not_the_radius() -> None:
    start = Weighting.even(2.0, 2, LAYERS)
    found = [start.varied(Random(seed)) for seed in range(400)]
    assert found[0] == start.varied(Random(0)) != found[1]
    assert {each.radius for each in found} == {2}
    logs = torch.tensor([[*each.reading, *each.visual, each.visual_weight / 2] for each in found])
    logs = logs.log()
    assert (logs != 0).all()
    assert logs.mean(dim=0).abs().max() < 5 * SPREAD / 20
    assert 0.8 < logs.std(dim=0).min() / SPREAD and logs.std(dim=0).max() / SPREAD < 1.2


def test_weightings_near_another_one() -> None:
    start = Weighting.even(2.0, None, LAYERS)
    radius, more, less = near(start)
    assert radius == replace(start, radius=PAPER_RADIUS) and near(radius)[0] == start
    assert more.visual_weight * less.visual_weight == pytest.approx(4.0)
    assert 1 < more.visual_weight / 2.0 == NEAR < VISUAL_WEIGHTS[1] / VISUAL_WEIGHTS[0]
    assert "layer factors" in str(start.varied(Random(0))) and "layer factors" not in str(start)


class FakeFitter:
    """A fitter that fits nothing and counts."""

    def __init__(self, statistics: Statistics):
        self.profile = make_profile(statistics)
        self.fitted: list[Layers] = []

    def fit(self, plans: Sequence[PruningPlan]) -> list[PruningPlan]:
        self.fitted += [plan.layers for plan in plans]
        return list(plans)


def counting(kl: Callable[[PruningPlan], float]) -> tuple[Callable, list[tuple[Layers, str]]]:
    """Return a measure and the list of its calls."""
    seen: list[tuple[Layers, str]] = []

    def measure(plan: PruningPlan) -> float:
        seen.append((plan.layers, plan.compensation))
        return kl(plan)

    return measure, seen


def wants_rank(plan: PruningPlan) -> float:
    """A made-up KL that reading heads, attending heads and neurons lower to different degrees."""
    heads = sum(len(layer.read_heads) + 2 * len(layer.attend_heads) for layer in plan.layers)
    return 10.0 / (1 + heads) + (plan.compensation == "none") + 0.1 * plan.budget.reached


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("asked", [None, "refit", "mean"])
def test_the_best_candidate_wins(kv_heads: int, asked: str | None) -> None:
    statistics = make_statistics(kv_heads)
    measure, seen = counting(wants_rank)
    fitter = FakeFitter(statistics)
    request = BudgetRequest(0.3, compensation=asked)
    plan, candidates = make_plan(statistics, request, measure, fitter)
    assert candidates[0].kl == min(each.kl for each in candidates) == wants_rank(plan)
    assert plan.layers == candidates[0].plan.layers
    assert len(seen) == len(set(seen)) == len(candidates)
    kinds = {each.compensation for each in candidates}
    assert kinds == ({"refit", "mean", "none"} if asked is None else {asked})
    allocated = [each for each in candidates if each.weighting is not None]
    assert (len(allocated) >= 4) == (asked != "mean")
    assert [each.compensation for each in allocated] == ["refit"] * len(allocated)
    assert len(fitter.fitted) == len(allocated)
    for each in candidates:
        assert each.plan.budget.reached == visual_budget(each.plan) <= 0.3
    assert plan.provenance["candidates"][0]["template"] == candidates[0].template


def test_a_search_from_an_allocation_keeps_the_budget() -> None:
    statistics = make_statistics(2)

    def kl(plan: PruningPlan) -> float:  # the less happens in the first layer, the better
        shape, workload = statistics.model.shape, statistics.workload
        dense = visual_flops_of_layer(full_layer(shape), shape, workload)
        return 0.01 + visual_flops_of_layer(plan.layers[0], shape, workload) / dense

    measure, seen = counting(kl)
    request = BudgetRequest(0.12, compensation="refit", search=40)
    plan, candidates = make_plan(statistics, request, measure, FakeFitter(statistics))
    assert plan.provenance["template"].startswith("search, allocated, visual weight ")
    assert candidates[0].kl == kl(plan) < candidates[1].kl
    assert plan.budget.reached <= 0.12 and plan.compensation == "refit"
    assert len(seen) == len(set(seen)), "a plan was measured twice"
    assert len(seen) <= len(candidates) - 1 + 40


def test_a_search_that_finds_nothing_keeps_the_best_candidate() -> None:
    statistics = make_statistics()
    measure, seen = counting(lambda plan: 1.0)
    request = BudgetRequest(0.3, compensation="refit", search=10)
    plan, candidates = make_plan(statistics, request, measure, FakeFitter(statistics))
    assert plan.provenance["template"].startswith("allocated, visual weight ")
    assert candidates[0] is candidates[1] and len(seen) == len(set(seen))


def test_a_refit_without_the_model_is_refused() -> None:
    for request in (
        PaperRequest(preset="yopo-25", compensation="refit"),
        PaperRequest(compensation="refit"),
        BudgetRequest(0.3, compensation="refit"),
    ):
        with pytest.raises(
            PlanError, match="fitted on the model, which is not available"
        ) as caught:
            make_plan(make_statistics(), request)
        assert caught.value.remedy == "Use `yopo calibrate --compensation refit`."


@pytest.mark.parametrize("asked", [None, "refit", "mean", "none"])
@pytest.mark.parametrize("template", [None, "reader"])
def test_an_unaffordable_budget_is_refused(asked: str | None, template: str | None) -> None:
    statistics = make_statistics()
    measure, seen = counting(wants_rank)
    request = BudgetRequest(1e-6, compensation=asked, template=template)
    with pytest.raises(PlanError, match="fits a visual budget of 1e-06"):
        make_plan(statistics, request, measure, FakeFitter(statistics))
    assert seen == []


def test_templates_are_candidates_if_nothing_can_be_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statistics = make_statistics()
    monkeypatch.setattr(planner.Allocator, "allocate", lambda self: None)
    measure, _ = counting(wants_rank)
    _, found = make_plan(statistics, BudgetRequest(0.3), measure, FakeFitter(statistics))
    assert found and all(isinstance(each, Candidate) and each.weighting is None for each in found)
    with pytest.raises(PlanError, match="fits a visual budget"):
        request = BudgetRequest(0.3, compensation="refit")
        make_plan(statistics, request, measure, FakeFitter(statistics))
