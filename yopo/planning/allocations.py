"""Fit and measure allocations of one budget: even ones, ones near the best, variations of the best.

Random variations of all layers at once find better plans in fewer runs than changes of one layer
at a time: a generation shares one dense walk, and the estimate leaves many layers wrong a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from yopo.fitting.fitter import TOGETHER
from yopo.planning.candidate import Candidate, kl_of
from yopo.planning.templates import Layers
from yopo.planning.weightings import Weighting, even_weightings, near
from yopo.plans.schema import PruningPlan
from yopo.support.console import note

GENERATIONS = 2
"""Generations of variations that every budget gets."""

GENERATION = TOGETHER
"""Variations in a generation."""

DRAWS = 8
"""Generations drawn, at most, for one that holds anything new."""

Measure = Callable[[PruningPlan], float]
"""Logit KL of a plan to the dense model, on pairs that were not used for fitting."""


class Allocations:
    """Allocations of one budget.

    Args:
        allocate: The layers that a weighting gives; None if nothing that reads fits the budget.
        fit: Fitted plans of several layers, made together.
        measure: Their KL.

    Attributes:
        found: The measured allocations, each with other layers, in order of measurement.
    """

    def __init__(
        self,
        allocate: Callable[[Weighting], Layers | None],
        fit: Callable[[Sequence[Layers]], list[PruningPlan]],
        measure: Measure,
    ):
        self._allocate, self._fit, self._measure = allocate, fit, measure
        self._random = Random(0)  # same inputs, same plan
        self.found: list[Candidate] = []

    @property
    def best(self) -> Candidate:
        """The one of the lowest KL."""
        return min(self.found, key=kl_of)

    def explore(self, layers: int) -> None:
        """What every budget gets.

        Args:
            layers: Layers of the decoder.
        """
        self.run(even_weightings(layers))
        if self.found:
            self.run(near(self._center))
            self.vary(GENERATIONS * GENERATION)

    def vary(self, runs: int) -> Candidate:
        """Vary the best, generation after generation.

        Args:
            runs: Measured plans at most.

        Returns:
            The best of all.
        """
        last, idle = len(self.found) + runs, 0
        while len(self.found) < last and idle < DRAWS:
            before, count = self.best, min(GENERATION, last - len(self.found))
            new = self.run([self._center.varied(self._random) for _ in range(count)])
            idle = 0 if new else idle + 1
            if self.best is not before:
                best = self.best
                note(f"{best.template}: logit KL {kl_of(best):.3g} ({len(self.found)} plans)")
        return self.best

    def run(self, weightings: Sequence[Weighting]) -> int:
        """Allocate by each weighting; fit what is new together, and measure it.

        Returns:
            How many were new.
        """
        new: dict[Layers, Weighting] = {}
        known = {each.plan.layers for each in self.found}
        for weighting in weightings:
            layers = self._allocate(weighting)
            if layers is not None and layers not in known:
                new.setdefault(layers, weighting)
        plans = self._fit(list(new)) if new else []
        for weighting, plan in zip(new.values(), plans, strict=True):
            kl = self._measure(plan)
            self._add(Candidate(f"allocated, {weighting}", "refit", plan, kl, weighting))
        return len(new)

    @property
    def _center(self) -> Weighting:
        weighting = self.best.weighting
        assert weighting is not None, "allocations have weightings"
        return weighting

    def _add(self, candidate: Candidate) -> None:
        """Add a candidate; only the better of it and the best keeps its fitted weights."""
        if self.found and kl_of(candidate) >= kl_of(self.best):
            candidate = without_weights(candidate)
        elif self.found:
            index = self.found.index(self.best)
            self.found[index] = without_weights(self.found[index])
        self.found.append(candidate)


def without_weights(candidate: Candidate) -> Candidate:
    """The same without its fitted weights, to save memory."""
    plan = candidate.plan
    return replace(candidate, plan=replace(plan, tensors=replace(plan.tensors, refit={})))
