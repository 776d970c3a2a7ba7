"""The image grids that a plan was calibrated on, beyond which its fitted weights are untried.

A linear map that stands in for FFNs is fitted to the states that visual tokens had. On grids much
larger than any of the calibration's they have others, and the map's error grows (see "Grids" in
yopo/README.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from yopo.plans.grid import Grid

MORE_TOKENS = 1.1
"""Tokens per image over the largest calibrated grid's that are still near it: processors round
sides to whole tokens, so that images of one size differ by a few percent. Not more: at 1.3 times
the tokens, plans for the demo model of glyphs diverge six to seven times as far as plans that are
fitted there."""

MORE_IMAGES = 2
"""Images per prompt over the calibrated number that are still near it: two images of calibrated
sizes, after a calibration on one, cost nothing."""


@dataclass(frozen=True)
class Extent:
    """The range of images in the calibration's prompts.

    Attributes:
        smallest: The grid of fewest tokens.
        largest: The grid of most tokens.
        images: Most images (or video frames, or tiles) of one prompt.
    """

    smallest: Grid
    largest: Grid
    images: int

    @classmethod
    def of(cls, prompts: Iterable[Sequence[Grid]]) -> Extent:
        """The extent of prompts, of at least one image altogether."""
        known = list(prompts)
        grids = sorted({grid for grids in known for grid in grids}, key=_size)
        return cls(grids[0], grids[-1], max(map(len, known)))

    def merge(self, other: Extent) -> Extent:
        """The extent of both calibrations."""
        smallest = min(self.smallest, other.smallest, key=_size)
        largest = max(self.largest, other.largest, key=_size)
        return Extent(smallest, largest, max(self.images, other.images))

    def exceeded_by(self, grids: Sequence[Grid]) -> str | None:
        """What of a prompt's images lies well beyond the extent, for a message; None if nothing."""
        largest = max(grids, key=_size, default=self.largest)
        if largest.tokens > MORE_TOKENS * self.largest.tokens:
            return (
                f"an image of {largest.rows} x {largest.cols} visual tokens, where the largest of "
                f"the calibration had {self.largest.rows} x {self.largest.cols}"
            )
        if len(grids) > MORE_IMAGES * self.images:
            return f"{len(grids)} images, where the calibration had at most {self.images}"
        return None


def extent_problem(extent: Extent | None) -> tuple[tuple[str, ...], str] | None:
    """What is wrong with an extent: a path of keys and the rest of a sentence, or None."""
    if extent is None:
        return None
    sizes = (extent.smallest.rows, extent.smallest.cols, extent.largest.rows, extent.largest.cols)
    if min(*sizes, extent.images) < 1:
        return ("calibrated",), "must hold positive sizes"
    if extent.smallest.tokens > extent.largest.tokens:
        return ("calibrated", "smallest"), "must have no more tokens than the largest"
    return None


def _size(grid: Grid) -> tuple[int, int, int]:
    return grid.tokens, grid.rows, grid.cols
