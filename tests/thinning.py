"""An external baseline: a new method needs only a class like this and a registry line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from yopo.baselines.baseline import Baseline
from yopo.baselines.prefill import Between
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, Workload

LINE = {"thinning": "thinning:Thinning"}
"""What the registry would say."""


@dataclass(frozen=True)
class Thinning(Baseline):
    """Keeps one in ``step`` visual tokens before every second layer.

    Attributes:
        step: Two: half of them, and half again.
    """

    step: int = 2

    name = "thinning"
    label = "Thinning"
    source = "here"

    @classmethod
    def choices(cls, shape: ModelShape, workload: Workload) -> Iterable[Thinning]:
        """Return a few choices."""
        return (cls(step) for step in (2, 4, 64))

    def tokens(self, shape: ModelShape, grids: Sequence[Grid]) -> tuple[int, ...]:
        """Return fewer tokens at every second layer."""
        count, counts = sum(grid.tokens for grid in grids), []
        for layer in range(shape.layers):
            count = -(-count // self.step) if layer % 2 else count
            counts.append(count)
        return tuple(counts)

    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """Describe the method in words."""
        return f"one of {self.step}, and again"

    def keep(self, between: Between) -> torch.Tensor | None:
        """Keep every ``step``-th token."""
        if between.number % 2 == 0:
            return None
        check(between)
        kept = torch.arange(0, between.num_visual, self.step)
        return kept.expand(len(between.ends), -1)


def check(between: Between) -> None:
    """Check that what a method sees between two layers is consistent."""
    length = between.stream.hidden.shape[1]
    previous = between.previous
    assert previous is not None
    assert previous.keys.shape[2] == previous.entered.hidden.shape[1] == length
    assert between.real is None or between.real.shape[1] == length
    rows = torch.arange(len(between.ends))
    assert torch.equal(between.stream.places[rows, between.ends], between.prompt.ends)
