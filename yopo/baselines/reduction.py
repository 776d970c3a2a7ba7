"""Fewer visual tokens before the first layer, by dropping or merging them.

Independent of methods and decoders. A method decides which tokens' places remain and how their
features are computed; the prompt is shortened here, both embeddings and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from yopo.baselines.token_stream import pick
from yopo.models.streams import TokenLayout
from yopo.plans.grid import Grid

Merge = Callable[[torch.Tensor], torch.Tensor]
"""(batch, visual, hidden) features of all visual tokens to (batch, kept, hidden)."""


@dataclass(frozen=True)
class Reduction:
    """The reduction of a batch's visual tokens.

    Attributes:
        kept: (batch, kept) int64, ascending: indices of the visual tokens whose places remain,
            counted over a row's images in order; the same number per row.
        merge: Computes the kept tokens' features, both from the image's embeddings and from what a
            model adds to them in later layers; None: they keep their own.
        positions: (axes, batch, sequence) int64, position ids after the reduction, used at the
            remaining tokens; None: they keep their own.
        shift: How much smaller the position of the token after the prompt becomes.
    """

    kept: torch.Tensor
    merge: Merge | None = None
    positions: torch.Tensor | None = None
    shift: int = 0

    @classmethod
    def of_images(
        cls,
        grids: Sequence[Grid],
        kept: Sequence[torch.Tensor],
        merge: Merge | None = None,
        positions: torch.Tensor | None = None,
        shift: int = 0,
    ) -> Reduction:
        """Combine the reductions of all images.

        Args:
            grids: The images of every row.
            kept: (batch, kept) int64 per image, ascending, indices within the image.
            merge: As above.
            positions: As above.
            shift: As above.
        """
        starts = [sum(grid.tokens for grid in grids[:number]) for number in range(len(grids))]
        parts = [start + index for start, index in zip(starts, kept, strict=True)]
        return cls(torch.cat(parts, dim=1), merge, positions, shift)

    def merged(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, visual, hidden) features of all visual tokens to (batch, kept, hidden)."""
        return pick(features, self.kept) if self.merge is None else self.merge(features)

    def shorten(
        self, layout: TokenLayout, embeds: torch.Tensor, positions: torch.Tensor
    ) -> Shortened:
        """Remove the dropped tokens from the prompts.

        Args:
            layout: Where the images are; the same number of visual tokens per row.
            embeds: (batch, sequence, hidden), image features merged in.
            positions: (axes, batch, sequence) int64.
        """
        remaining = layout.visual.index.gather(1, self.kept)
        index = torch.cat([layout.text.index, remaining], dim=1).sort(dim=1).values
        features = self.merged(layout.visual.gather(embeds)).to(embeds)
        mixed = embeds.scatter(1, remaining[..., None].expand_as(features), features)
        moved = positions if self.positions is None else self.positions
        return Shortened(
            index,
            pick(mixed, index),
            moved.gather(2, index.expand(len(moved), -1, -1)),
            torch.searchsorted(index, remaining),
        )


@dataclass(frozen=True)
class Shortened:
    """Prompts after a reduction.

    Attributes:
        index: (batch, shorter) int64, the positions that remain, ascending.
        embeds: (batch, shorter, hidden).
        positions: (axes, batch, shorter) int64.
        visual: (batch, kept) int64, which of the ``shorter`` tokens are visual.
    """

    index: torch.Tensor
    embeds: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
