"""Image features pooled to a smaller grid before the decoder, as if the image were smaller.

The baseline that "Are We Using the Right Benchmark" (arXiv 2510.07143) finds better than many token
compression methods. It pools the features after the projector, so the vision encoder still sees
the whole image; positions are those of the shorter prompt, by row and column under M-RoPE.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch.nn.functional import adaptive_avg_pool2d

from yopo.baselines.baseline import Baseline, share_of
from yopo.baselines.prefill import Prompt
from yopo.baselines.reduction import Reduction
from yopo.models.family import Family
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, Workload
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Downsampling(Baseline):
    """Smaller images.

    Attributes:
        scale: Ratio of every image's rows and columns to the original ones.
    """

    scale: tuple[float, float] = (1.0, 1.0)

    name = "downsample"
    label = "downsampling"
    source = "arXiv 2510.07143"

    @classmethod
    def choices(cls, shape: ModelShape, workload: Workload) -> Iterable[Self]:
        """Every scale that changes an image's grid; rows and columns at most one step apart."""
        steps = sorted(
            {
                k / side
                for grid in workload.grids
                for side in (grid.rows, grid.cols)
                for k in range(1, side + 1)
            }
        )
        pairs = [*zip(steps, steps, strict=True), *zip(steps, steps[1:], strict=False)]
        return (cls(pair) for pair in pairs)

    def grid(self, grid: Grid) -> Grid:
        """The reduced grid of an image."""
        rows, cols = self.scale
        return Grid(max(1, share_of(rows, grid.rows)), max(1, share_of(cols, grid.cols)))

    def tokens(self, shape: ModelShape, grids: Sequence[Grid]) -> tuple[int, ...]:
        """The tokens of the smaller images, in every layer."""
        return (sum(self.grid(grid).tokens for grid in grids),) * shape.layers

    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """The grids before and after."""
        pairs = ((each, self.grid(each)) for each in dict.fromkeys(workload.grids))
        return ", ".join(f"{old.rows}x{old.cols} to {new.rows}x{new.cols}" for old, new in pairs)

    def check_model(self, model: PreTrainedModel, family: Family) -> None:
        """Check that all tokens of an image are pixels.

        Raises:
            ModelError: The family puts newline tokens into its images.
        """
        if family.ends_rows(model.config):
            raise ModelError(
                f"{family.name} ends image rows with newline tokens, which downsampling cannot "
                "place.",
                remedy="Compare with methods that drop tokens, such as vtw and fastv.",
            )

    def reduce(
        self, prompt: Prompt, embeds: torch.Tensor, positions: torch.Tensor
    ) -> Reduction | None:
        """Pool every image into its first places; the text after it moves up.

        Raises:
            ModelError: The rows' images differ, or are the frames of a video.
        """
        layout = prompt.layout
        if not layout.has_uniform_grids:
            raise ModelError(
                "Downsampling needs images with the same grids in all rows of a batch.",
                remedy="Use batches of one prompt.",
            )
        grids, batch = layout.grids[0], len(embeds)
        smaller = [self.grid(grid) for grid in grids]
        first = [torch.arange(new.tokens).expand(batch, -1) for new in smaller]
        merge = partial(pool, grids=grids, smaller=smaller)
        reduction = Reduction.of_images(grids, [each.to(embeds.device) for each in first], merge)
        remaining = layout.visual.index.gather(1, reduction.kept)
        moved, shift = _moved(positions, layout.visual.index, grids, smaller, remaining)
        return replace(reduction, positions=moved, shift=shift)


def pool(features: torch.Tensor, grids: Sequence[Grid], smaller: Sequence[Grid]) -> torch.Tensor:
    """Area-pool consecutive images: (batch, visual, hidden) to (batch, fewer, hidden)."""
    parts, start = [], 0
    for old, new in zip(grids, smaller, strict=True):
        image = features[:, start : start + old.tokens].unflatten(1, (old.rows, old.cols))
        area = adaptive_avg_pool2d(image.permute(0, 3, 1, 2).float(), (new.rows, new.cols))
        parts.append(area.flatten(2).transpose(1, 2).to(features.dtype))
        start += old.tokens
    return torch.cat(parts, dim=1)


def _starts(grids: Sequence[Grid], smaller: Sequence[Grid]) -> list[tuple[int, Grid]]:
    """Where each image starts along the visual stream, and its smaller grid."""
    starts = [sum(grid.tokens for grid in grids[:number]) for number in range(len(grids))]
    return list(zip(starts, smaller, strict=True))


def _moved(
    positions: torch.Tensor,
    visual: torch.Tensor,
    grids: Sequence[Grid],
    smaller: Sequence[Grid],
    remaining: torch.Tensor,
) -> tuple[torch.Tensor, int]:
    """Positions of the shorter prompt, at the remaining places, and the total shift."""
    axes, batch, length = positions.shape
    after = torch.zeros(batch, length, dtype=torch.int64, device=positions.device)
    images: list[torch.Tensor] = []
    before: torch.Tensor | None = None
    total = 0
    for (start, new), old in zip(_starts(grids, smaller), grids, strict=True):
        first, last = visual[:, start], visual[:, start + old.tokens - 1]
        begin = positions.gather(2, first.expand(axes, batch)[..., None])
        if axes > 1 and before is not None and bool((begin[1] == before[1]).any()):
            raise ModelError(
                "Downsampling does not support videos: it does not know their frames' positions.",
                remedy="Compare on images.",
            )
        images.append(begin - total + _offsets(new, axes).to(begin)[:, None])
        shrunk = _span(old, axes) - _span(new, axes)
        after.scatter_(1, last[:, None], shrunk)
        total += shrunk
        before = begin
    moved = positions - after.cumsum(dim=1)
    moved.scatter_(2, remaining.expand(axes, -1, -1), torch.cat(images, dim=2))
    return moved, total


def _span(grid: Grid, axes: int) -> int:
    """How far an image advances the position of the token after it."""
    return grid.tokens if axes == 1 else max(grid.rows, grid.cols)


def _offsets(grid: Grid, axes: int) -> torch.Tensor:
    """(axes, tokens) int64: positions inside an image, relative to its first token."""
    place = torch.arange(grid.tokens)
    if axes == 1:
        return place[None]
    return torch.stack([torch.zeros_like(place), place // grid.cols, place % grid.cols])
