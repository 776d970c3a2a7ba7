"""Allocations are explored in a fixed order, fitted together, and only the best stays in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import statistics_maker
import torch

from yopo.planning.allocations import DRAWS, GENERATION, GENERATIONS, Allocations, kl_of
from yopo.planning.templates import Layers
from yopo.planning.weightings import VISUAL_WEIGHTS, Weighting, even_weightings, near
from yopo.plans.schema import Budget, LayerPlan, PruningPlan
from yopo.plans.tensors import PlanTensors

LAYERS, HEADS, FFN = 3, 4, 32
STATISTICS = statistics_maker.make(layers=LAYERS, heads=HEADS, kv_heads=HEADS)


def layers_of(weighting: Weighting) -> Layers:
    """Layers that differ wherever weightings do, as far as neurons can tell them apart."""
    number = hash(weighting) % (FFN**LAYERS)
    widths = [number // FFN**layer % FFN for layer in range(LAYERS)]
    return tuple(LayerPlan((0,), (), weighting.radius, width) for width in widths)


class Bench:
    """A budget whose plans cost nothing to fit; records what was asked of it."""

    def __init__(
        self,
        kl: Callable[[Weighting], float],
        allocate: Callable[[Weighting], Layers | None] = layers_of,
    ):
        self.fits: list[int] = []
        self.weightings: dict[Layers, Weighting] = {}
        self._kl, self._layers = kl, allocate
        self.allocations = Allocations(self._allocate, self._fit, self._measure)

    def _allocate(self, weighting: Weighting) -> Layers | None:
        layers = self._layers(weighting)
        if layers is not None:
            self.weightings.setdefault(layers, weighting)
        return layers

    def _fit(self, many: Sequence[Layers]) -> list[PruningPlan]:
        self.fits.append(len(many))
        tensors = PlanTensors(refit={0: {"output": torch.ones(1)}})
        return [
            PruningPlan(
                STATISTICS.model,
                STATISTICS.workload,
                layers,
                Budget(0.1, 0.1),
                compensation="refit",
                tensors=tensors,
            )
            for layers in many
        ]

    def _measure(self, plan: PruningPlan) -> float:
        assert plan.tensors.refit, "what is measured is fitted"
        return self._kl(self.weightings[plan.layers])

    @property
    def tried(self) -> list[Weighting | None]:
        return [each.weighting for each in self.allocations.found]


def distance(weighting: Weighting) -> float:
    """A made-up KL: best at a visual weight of 10, and where layer 0 is read more than layer 1."""
    ratio = weighting.reading[0] / weighting.reading[1] / 4
    return 1 + abs(weighting.visual_weight / 10 - 1) + abs(ratio - 1)


def test_even_weightings_come_first_then_neighbors_then_variations_of_the_best() -> None:
    bench = Bench(distance)
    bench.allocations.explore(LAYERS)
    evens, tried = even_weightings(LAYERS), bench.tried
    assert [each.visual_weight for each in evens] == list(VISUAL_WEIGHTS)
    assert tried[: len(evens)] == list(evens)
    best = evens[VISUAL_WEIGHTS.index(10.0)]
    assert tried[len(evens) : len(evens) + 3] == list(near(best))
    assert bench.fits == [len(evens), 3, *[GENERATION] * GENERATIONS]
    varied = tried[len(evens) + 3 :]
    assert len(varied) == GENERATION * GENERATIONS
    assert all(each is not None and not each.is_even for each in varied)


def test_variations_improve_on_even_weightings_and_repeat() -> None:
    first, again = Bench(distance), Bench(distance)
    for bench in (first, again):
        bench.allocations.explore(LAYERS)
        bench.allocations.vary(40)
    best = first.allocations.best
    assert kl_of(best) == min(kl_of(each) for each in first.allocations.found)
    assert kl_of(best) < min(distance(each) for each in even_weightings(LAYERS))
    assert first.tried == again.tried


@pytest.mark.parametrize("runs", [1, 4, 6])
def test_no_more_variations_are_measured_than_allowed(runs: int) -> None:
    bench = Bench(distance)
    bench.allocations.run(even_weightings(LAYERS))
    before = len(bench.allocations.found)
    bench.allocations.vary(runs)
    assert len(bench.allocations.found) == before + runs


def test_variations_that_change_nothing_come_to_an_end() -> None:
    bench = Bench(distance, lambda weighting: layers_of(Weighting.even(1.0, None, LAYERS)))
    bench.allocations.explore(LAYERS)
    assert len(bench.allocations.found) == 1 and bench.fits == [1]
    assert DRAWS > 1


def test_only_the_best_keeps_its_fitted_weights() -> None:
    bench = Bench(distance)
    bench.allocations.explore(LAYERS)
    kept = [each for each in bench.allocations.found if each.plan.tensors.refit]
    assert kept == [bench.allocations.best]
    assert all(each.plan.compensation == "refit" for each in bench.allocations.found)


def test_a_tie_keeps_the_first_with_its_weights() -> None:
    bench = Bench(lambda weighting: 1.0)
    bench.allocations.run(even_weightings(LAYERS))
    assert bench.allocations.best is bench.allocations.found[0]
    assert bench.allocations.best.plan.tensors.refit


def test_the_same_layers_are_fitted_once() -> None:
    even = Weighting.even(1.0, None, LAYERS)
    bench = Bench(distance, lambda weighting: layers_of(replace(weighting, visual_weight=1.0)))
    assert bench.allocations.run([even, replace(even, visual_weight=2.0)]) == 1
    assert bench.allocations.run([replace(even, visual_weight=3.0)]) == 0
    assert bench.fits == [1]


def test_a_budget_that_fits_nothing_finds_nothing() -> None:
    bench = Bench(distance, lambda weighting: None)
    bench.allocations.explore(LAYERS)
    assert bench.allocations.found == [] and bench.fits == []
