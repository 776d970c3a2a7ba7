"""Running sums of a calibration pass: of one batch, of what one process saw, or of all."""

from __future__ import annotations

from collections import Counter

import torch

from yopo.calibration.inner_text import InnerText
from yopo.calibration.statistics import sum_sizes
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape
from yopo.support.work_dir import Stage

_COUNTS = ("visual_tokens", "text_queries", "text_tokens", "text_before")


class Running:
    """Sums over pairs (see ``Statistics`` for what they mean), zero at first.

    Args:
        shape: The decoder's dimensions.

    Attributes:
        rho: (pairs of a batch, L, H) float32 each, in the order of the pairs.
        sums: The sums of ``Statistics`` by name.
        grids: How many prompts have which images.
        inner_text: Text inside them.
    """

    def __init__(self, shape: ModelShape):
        self.shape = shape
        self.rho: list[torch.Tensor] = []
        self.sums = {
            name: torch.zeros(size, dtype=torch.float64) for name, size in sum_sizes(shape).items()
        }
        self.visual_tokens = 0
        self.text_queries = 0
        self.text_tokens = 0
        self.text_before = 0
        self.grids: Counter[tuple[Grid, ...]] = Counter()
        self.inner_text: dict[tuple[Grid, ...], InnerText] = {}

    def add(self, other: Running) -> None:
        """Add the sums over the pairs that follow."""
        self.rho += other.rho
        for name, total in self.sums.items():
            total += other.sums[name]
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for grids, count in other.grids.items():
            self.grids[grids] += count
            known = self.inner_text.get(grids, InnerText.nowhere(grids))
            self.inner_text[grids] = known.merge(other.inner_text[grids])

    def snapshot(self) -> Stage:
        """The sums, between two batches."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        grids = [
            [[vars(grid) for grid in prompt], count, vars(self.inner_text[prompt])]
            for prompt, count in self.grids.items()
        ]
        about = {**counts, "grids": grids, "pairs": sum(map(len, self.rho))}
        return Stage({**self.sums, "rho": torch.cat(self.rho)}, about)

    def restore(self, kept: Stage) -> None:
        """Go on from a snapshot."""
        self.rho = [kept.tensors["rho"]]
        self.sums = {name: kept.tensors[name] for name in self.sums}
        for name in _COUNTS:
            setattr(self, name, kept.about[name])
        for sizes, count, inner in kept.about["grids"]:
            prompt = tuple(Grid(**size) for size in sizes)
            self.grids[prompt] = count
            self.inner_text[prompt] = InnerText(**inner | {"between": tuple(inner["between"])})
