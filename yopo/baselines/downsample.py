"""Image features pooled to a smaller grid in front of the decoder, as a smaller image would come.

The baseline that "Are We Using the Right Benchmark" (arXiv 2510.07143) finds above many token
compression methods. It pools the features behind the projector, so the vision encoder still sees
the whole image; positions are those of the shorter prompt, by row and column under M-RoPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import adaptive_avg_pool2d

from yopo.baselines.settings import Setting
from yopo.baselines.token_stream import pick
from yopo.models.layout import TokenLayout
from yopo.plans.grid import Grid
from yopo.support.errors import ModelError


@dataclass(frozen=True)
class Smaller:
    """A prompt with smaller images.

    Attributes:
        index: (batch, shorter) int64, the positions that remain; an image keeps its first ones.
        embeds: (batch, shorter, hidden).
        positions: (axes, batch, shorter) int64.
        visual: (batch, fewer visual) int64, where its visual tokens are.
        shift: How much smaller the next token's position is.
    """

    index: torch.Tensor
    embeds: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    shift: int


def downsample(
    setting: Setting, layout: TokenLayout, embeds: torch.Tensor, positions: torch.Tensor
) -> Smaller:
    """Pool every image of a batch.

    Args:
        setting: How much smaller grids become.
        layout: Where the images are; all rows hold the same grids.
        embeds: (batch, sequence, hidden), image features merged in.
        positions: (axes, batch, sequence) int64; axes 1, or 3 (time, row, column) under M-RoPE.

    Raises:
        ModelError: The rows' images differ, or are the frames of a video.
    """
    if not layout.has_uniform_grids:
        raise ModelError(
            "Downsampling wants images of the same grids in all rows of a batch.",
            remedy="Use batches of one prompt.",
        )
    grids = layout.grids[0]
    smaller = [setting.grid(grid) for grid in grids]
    columns = [start + torch.arange(new.tokens) for start, new in _starts(grids, smaller)]
    visual = layout.visual.index
    remaining = visual[:, torch.cat(columns).to(visual.device)]
    index = torch.cat([layout.text.index, remaining], dim=1).sort(dim=1).values
    mixed = embeds.clone()
    pooled = pool_layout(setting, layout, layout.visual.gather(embeds))
    mixed.scatter_(1, remaining[..., None].expand(-1, -1, embeds.shape[-1]), pooled)
    moved, shift = _moved(positions, visual, grids, smaller, remaining)
    placed = moved.gather(2, index.expand(len(moved), -1, -1))
    visual = torch.searchsorted(index, remaining)
    return Smaller(index, pick(mixed, index), placed, visual, shift)


def pool_layout(setting: Setting, layout: TokenLayout, features: torch.Tensor) -> torch.Tensor:
    """Pool the images of a batch: (batch, visual, hidden) to (batch, fewer, hidden)."""
    grids = layout.grids[0]
    return pool(features, grids, [setting.grid(grid) for grid in grids])


def pool(features: torch.Tensor, grids: Sequence[Grid], smaller: Sequence[Grid]) -> torch.Tensor:
    """Area-pool images behind one another: (batch, visual, hidden) to (batch, fewer, hidden)."""
    parts, start = [], 0
    for old, new in zip(grids, smaller, strict=True):
        image = features[:, start : start + old.tokens].unflatten(1, (old.rows, old.cols))
        area = adaptive_avg_pool2d(image.permute(0, 3, 1, 2).float(), (new.rows, new.cols))
        parts.append(area.flatten(2).transpose(1, 2).to(features.dtype))
        start += old.tokens
    return torch.cat(parts, dim=1)


def _starts(grids: Sequence[Grid], smaller: Sequence[Grid]) -> list[tuple[int, Grid]]:
    """Where each image starts along the visual stream, and what it becomes."""
    starts = [sum(grid.tokens for grid in grids[:number]) for number in range(len(grids))]
    return list(zip(starts, smaller, strict=True))


def _moved(
    positions: torch.Tensor,
    visual: torch.Tensor,
    grids: Sequence[Grid],
    smaller: Sequence[Grid],
    remaining: torch.Tensor,
) -> tuple[torch.Tensor, int]:
    """Positions as the shorter prompt has them, at the remaining places; and the total shift."""
    axes, batch, length = positions.shape
    after = torch.zeros(batch, length, dtype=torch.int64, device=positions.device)
    images, begin, total = [], None, 0
    for (start, new), old in zip(_starts(grids, smaller), grids, strict=True):
        first, last = visual[:, start], visual[:, start + old.tokens - 1]
        before, begin = begin, positions.gather(2, first.expand(axes, batch)[..., None])
        if axes > 1 and before is not None and bool((begin[1] == before[1]).any()):
            raise ModelError(
                "Downsampling does not know how a video's frames are placed.",
                remedy="Compare on images.",
            )
        images.append(begin - total + _offsets(new, axes).to(begin)[:, None])
        shrunk = _span(old, axes) - _span(new, axes)
        after.scatter_(1, last[:, None], shrunk)
        total += shrunk
    moved = positions - after.cumsum(dim=1)
    moved.scatter_(2, remaining.expand(axes, -1, -1), torch.cat(images, dim=2))
    return moved, total


def _span(grid: Grid, axes: int) -> int:
    """How far an image moves the position of the token behind it."""
    return grid.tokens if axes == 1 else max(grid.rows, grid.cols)


def _offsets(grid: Grid, axes: int) -> torch.Tensor:
    """(axes, tokens) int64: positions inside an image, over its first token's."""
    place = torch.arange(grid.tokens)
    if axes == 1:
        return place[None]
    return torch.stack([torch.zeros_like(place), place // grid.cols, place % grid.cols])
