"""Counts the text between and inside the images of prompts with the same grids."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from yopo.plans.grid import Grid
from yopo.plans.workload import Workload


@dataclass(frozen=True)
class InnerText:
    """Sums over the prompts whose images have the same grids.

    Attributes:
        prompts: Their number.
        between: Text tokens between each image and the next.
        inside: Text tokens inside images, at the ends of rows.
    """

    prompts: int
    between: tuple[int, ...]
    inside: int

    @classmethod
    def nowhere(cls, grids: tuple[Grid, ...]) -> InnerText:
        """Of no prompt yet."""
        return cls(0, (0,) * (len(grids) - 1), 0)

    def plus(self, grids: tuple[Grid, ...], positions: torch.Tensor) -> InnerText:
        """With one more prompt: (visual tokens,) ascending positions in its sequence."""
        gaps = (positions.diff() - 1).cpu()
        ends = torch.tensor([grid.tokens for grid in grids]).cumsum(0)[:-1] - 1
        between = gaps[ends].tolist()
        pairs = zip(self.between, between, strict=True)
        inside = self.inside + int(gaps.sum()) - sum(between)
        return InnerText(self.prompts + 1, tuple(one + more for one, more in pairs), inside)

    def merge(self, other: InnerText) -> InnerText:
        """With the prompts of another sum, whose images have the same grids."""
        pairs = zip(self.between, other.between, strict=True)
        between = tuple(one + more for one, more in pairs)
        return InnerText(self.prompts + other.prompts, between, self.inside + other.inside)

    def within(self, grids: tuple[Grid, ...], text: int, before: int) -> Workload:
        """The mean prompt: of these images, with this text and as much of it before them.

        Text is a mean over all prompts, whose images may be smaller; these need some at least.
        """
        row_ends = sum(grid.rows - 1 for grid in grids) * self.prompts
        ends = round(self.inside / row_ends) if row_ends else 0
        between = tuple(round(gap / self.prompts) for gap in self.between)
        found = Workload(grids, text, before, between if any(between) else (), ends)
        return replace(found, text=max(text, before + found.text_inside))
