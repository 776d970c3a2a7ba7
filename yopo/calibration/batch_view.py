"""Queries and keys of a batch to score, determined once for all layers."""

from __future__ import annotations

import torch

from yopo.calibration.statistics import MAX_DISTANCE
from yopo.models.streams import TokenLayout
from yopo.support.errors import DataError

CHUNK = 64
"""Queries scored at once: (batch, heads, 64, keys) float32 is the largest tensor."""


class Chunk:
    """Some queries of a batch.

    Attributes:
        positions: (batch, queries) int64 positions in the sequence.
        counted: (batch, queries) float32, 1 where head activity counts the query.
        after: (batch, queries) float32, 1 on real text after the first image.
        span: The chunk's range in its stream.
    """

    def __init__(
        self, positions: torch.Tensor, counted: torch.Tensor, after: torch.Tensor, span: slice
    ):
        self.positions, self.span = positions[:, span], span
        self.counted, self.after = counted[:, span].float(), after[:, span].float()


class BatchView:
    """Positions and masks of one batch, shared by all layers.

    Args:
        layout: Where text and visual tokens are.
        real: (batch, sequence) bool, False on padding.
        queries: Which queries head activity counts.
        cells: (batch, visual, 3) int64, (image, row, column) of every visual token; None: those of
            the layout's grids.

    Attributes:
        kinds: (batch, sequence, 2) float32, one-hot of (visual, text): attention weights times
            ``kinds`` give a query's visual and text mass.
    """

    def __init__(
        self,
        layout: TokenLayout,
        real: torch.Tensor,
        queries: str,
        cells: torch.Tensor | None = None,
    ):
        self.layout, self._real = layout, real
        text, visual = layout.text, layout.visual
        batch, length = real.shape
        self.visual_positions = visual.by_row()
        is_visual = torch.zeros(batch, length, device=real.device)
        for row, positions in enumerate(self.visual_positions):
            is_visual[row, positions] = 1.0
        self.kinds = torch.stack([is_visual, 1.0 - is_visual], dim=-1)
        first_visual = torch.stack([positions[0] for positions in self.visual_positions])
        is_text = real.gather(1, text.index)
        if text.mask is not None:
            is_text = is_text & text.mask
        after = is_text & (text.index > first_visual[:, None])
        last = text.index == torch.where(real, torch.arange(length, device=real.device), -1).amax(
            dim=1, keepdim=True
        )
        counted = {"text": after, "all": is_text, "last": is_text & last}[queries]
        is_real_visual = torch.ones_like(visual.index, dtype=torch.bool)
        if visual.mask is not None:
            is_real_visual = visual.mask
        self.num_visual = int(is_real_visual.sum())
        self.num_after, self.num_before = int(after.sum()), int((is_text & ~after).sum())
        if not bool(counted.any(dim=1).all()):
            raise DataError("A prompt has no text after its image: nothing reads the image.")
        wanted = (counted | after).any(dim=0)
        self.text_chunks = [
            Chunk(text.index, counted, after, span)
            for span in _spans(text.length)
            if bool(wanted[span].any())
        ]
        nothing = torch.zeros_like(is_real_visual)
        self.visual_chunks = [
            Chunk(visual.index, is_real_visual, nothing, span) for span in _spans(visual.length)
        ]
        self._cells = layout.coordinates() if cells is None else cells

    def allowed(self, chunk: Chunk) -> torch.Tensor:
        """(batch, 1, queries, keys) bool: real keys no later than the query."""
        place = torch.arange(self._real.shape[1], device=self._real.device)
        not_later = place[None, None, :] <= chunk.positions[:, :, None]
        own = place[None, None, :] == chunk.positions[:, :, None]
        return ((not_later & self._real[:, None, :]) | own)[:, None]

    def by_distance(self, chunk: Chunk, weights: torch.Tensor) -> torch.Tensor:
        """Sum visual-to-visual attention (batch, queries, keys) per Chebyshev distance.

        Returns:
            (MAX_DISTANCE + 2,) float32; the last entry is for other images.
        """
        keys = self.layout.visual.index[:, None, :].expand(-1, weights.shape[1], -1)
        mass = weights.gather(2, keys)
        queries, others = self._cells[:, chunk.span, None], self._cells[:, None]
        distance = (queries[..., 1:] - others[..., 1:]).abs().amax(dim=-1).clamp(max=MAX_DISTANCE)
        distance = distance.masked_fill(queries[..., 0] != others[..., 0], MAX_DISTANCE + 1)
        real = (queries[..., 0] >= 0) & (others[..., 0] >= 0)
        mass = (mass * real).flatten()
        return torch.bincount(distance.flatten(), weights=mass, minlength=MAX_DISTANCE + 2)


def _spans(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
