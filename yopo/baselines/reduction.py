"""Fewer visual tokens in front of the first layer: some are kept, or what they hold is merged.

Nothing here knows a method or a decoder. A reducer says per image which tokens' places remain and
how features become theirs; the prompt is shortened here, embeddings and positions alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from yopo.baselines.token_stream import pick
from yopo.models.layout import TokenLayout
from yopo.plans.grid import Grid

Merge = Callable[[torch.Tensor], torch.Tensor]
"""(batch, visual, hidden) features of all visual tokens to (batch, kept, hidden)."""


@dataclass(frozen=True)
class Reduction:
    """What becomes of a batch's visual tokens.

    Attributes:
        kept: (batch, kept) int64, ascending: the visual tokens whose places remain, 0 the first of
            a row's first image and images one after another; equally many per row.
        merge: Makes the kept tokens' features, of the image's embeddings and of whatever a model
            adds to them in later layers alike; None: they keep their own.
        positions: (axes, batch, sequence) int64, position ids after the reduction, of which those
            of remaining tokens are used; None: they keep their own.
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
        """Put images together.

        Args:
            grids: The images of every row.
            kept: (batch, kept) int64 per image, ascending, 0 the image's first token.
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
        """Take the dropped tokens out of the prompts.

        Args:
            layout: Where the images are; equally many visual tokens per row.
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
