"""A regular grid of fewer tokens: each the mean of its cell, at the place of the cell's middle.

The plain alternative that "Are We Using the Right Benchmark" (arXiv 2510.07143) finds better than
many methods. Unlike the baseline ``downsample``, tokens keep original positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yopo.reduction.method import Images, Method, Selection, Sides

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RegularGrid(Method):
    """Fewer rows and columns.

    Attributes:
        merge: Whether a token becomes the mean of its cell; else it keeps its own features.
    """

    merge: bool = True

    name = "grid"
    label = "regular grid"
    source = "arXiv 2510.07143"
    is_regular = True

    @property
    def mixes(self) -> bool:
        """Whether tokens are merged."""
        return self.merge

    def count(self, sides: Sides) -> int:
        """Rows times columns of the coarser grid."""
        rows, cols = self.coarser(sides)
        return rows * cols

    def coarser(self, sides: Sides) -> Sides:
        """The grid of the most tokens within the share; of equals, the most even in scale."""
        most = super().count(sides)
        sizes = [(rows, min(sides[1], most // rows)) for rows in range(1, min(sides[0], most) + 1)]

        def merit(size: Sides) -> tuple[int, float]:
            high, wide = size[0] / sides[0], size[1] / sides[1]
            return size[0] * size[1], min(high, wide) / max(high, wide)

        even = [size for size in sizes if merit(size)[1] > 0.5]
        return max(even or sizes, key=merit)

    def select(self, images: Images) -> Selection:
        """One token per cell."""
        import torch

        from yopo.reduction.arithmetic import means

        (rows, cols), (high, wide) = images.sides, self.coarser(images.sides)
        many, device = len(images.features), images.features.device
        down = torch.arange(rows) * high // rows
        across = torch.arange(cols) * wide // cols
        into = (down[:, None] * wide + across).flatten().to(device)
        middle_row = torch.stack([_middle(down == each) for each in range(high)])
        middle_col = torch.stack([_middle(across == each) for each in range(wide)])
        kept = (middle_row[:, None] * cols + middle_col).flatten().to(device).expand(many, -1)
        return means(kept, into.expand(many, -1)) if self.merge else Selection(kept)


def _middle(member: torch.Tensor) -> torch.Tensor:
    places = member.nonzero()[:, 0]
    return places[(len(places) - 1) // 2]
