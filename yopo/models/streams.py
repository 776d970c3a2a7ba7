"""Text and visual tokens of a batch of prompts, as two streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from yopo.models.devices import moved
from yopo.plans.grid import Grid


@dataclass(frozen=True)
class Stream:
    """The positions of one kind of token (text or visual) in a batch.

    Attributes:
        index: (batch, length) int64, positions in the forward's sequence, ascending; rows with
            fewer tokens are padded with position 0.
        mask: (batch, length) bool, False on padding; None without padding.
        shared: Whether all rows have the same positions.
    """

    index: torch.Tensor
    mask: torch.Tensor | None
    shared: bool

    @property
    def length(self) -> int:
        """Tokens per row, padding included."""
        return self.index.shape[1]

    def to(self, device: torch.device) -> Stream:
        """This stream with its positions on a device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Stream(self.index.to(device), mask, self.shared)

    def by_row(self) -> list[torch.Tensor]:
        """(tokens,) positions of every row, without padding."""
        if self.mask is None:
            return list(self.index)
        return [row[real] for row, real in zip(self.index, self.mask, strict=True)]

    def unflatten(self, values: torch.Tensor) -> torch.Tensor:
        """Arrange (tokens of all rows, width) values as (batch, length, width), 0 on padding."""
        if self.mask is None:
            return values.reshape(*self.index.shape, -1)
        padded = values.new_zeros(*self.index.shape, values.shape[-1])
        padded[self.mask] = values
        return padded

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pick this stream's rows of a (batch, sequence, width) tensor."""
        if self.shared:
            return tensor.index_select(1, self.index[0])
        return tensor.gather(1, self.index.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))

    def marks(self, length: int) -> torch.Tensor:
        """(batch, length) bool, True on the sequence positions of this stream."""
        table = self.index.new_zeros((*self.index.shape[:1], length, 1), dtype=torch.bool)
        self.scatter(table, torch.ones_like(self.index, dtype=torch.bool)[..., None])
        return table[..., 0]

    def scatter(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Write (batch, length, width) values back to their positions in ``target``."""
        if self.shared:
            target.index_copy_(1, self.index[0], values)
            return
        rows = torch.arange(target.shape[0], device=target.device).unsqueeze(1)
        rows = rows.expand_as(self.index)
        if self.mask is None:
            target[rows, self.index] = values
        else:
            target[rows[self.mask], self.index[self.mask]] = values[self.mask]


@dataclass(frozen=True)
class TokenLayout:
    """Text and visual tokens of one forward, and the grids of its images.

    Attributes:
        text: Every token that is not visual, attention-mask padding included.
        visual: The visual tokens, image after image.
        grids: The image grids of every batch row, in prompt order.
        ids: (batch, sequence) int64 token ids; None where the caller passed embeddings.
        attention: (batch, visual length) float32, the vision tower's attention on every visual
            token, 1 in sum over an image; None unless it is recorded.
    """

    text: Stream
    visual: Stream
    grids: tuple[tuple[Grid, ...], ...]
    ids: torch.Tensor | None = None
    attention: torch.Tensor | None = None

    def to(self, device: torch.device) -> TokenLayout:
        """This layout with its positions on a device."""
        if self.text.index.device == device:
            return self
        ids, attention = moved((self.ids, self.attention), device)
        return TokenLayout(self.text.to(device), self.visual.to(device), self.grids, ids, attention)

    @property
    def has_uniform_grids(self) -> bool:
        """Whether all batch rows hold images of the same grids."""
        return all(row == self.grids[0] for row in self.grids)

    def coordinates(self) -> torch.Tensor:
        """(batch, visual length, 3) int64: (image, row, column) per visual token, -1 on padding."""
        table = torch.full((*self.visual.index.shape, 3), -1, dtype=torch.int64)
        for batch_row, grids in enumerate(self.grids):
            start = 0
            for image, grid in enumerate(grids):
                place = torch.arange(grid.tokens)
                cells = torch.stack(
                    [torch.full_like(place, image), place // grid.cols, place % grid.cols], dim=-1
                )
                table[batch_row, start : start + grid.tokens] = cells
                start += grid.tokens
        return table.to(self.visual.index.device)


def build_layout(
    is_visual: torch.Tensor,
    grids: Sequence[tuple[Grid, ...]],
    ids: torch.Tensor | None = None,
) -> TokenLayout:
    """Split a batch into its text and visual streams.

    Args:
        is_visual: (batch, sequence) bool, True on visual tokens.
        grids: Image grids per batch row; their tokens add up to the row's visual tokens.
        ids: (batch, sequence) int64 token ids, if they are known.

    Returns:
        The layout, on ``is_visual``'s device.
    """
    visual = _stream(is_visual)
    return TokenLayout(_stream(~is_visual), visual, tuple(tuple(row) for row in grids), ids)


def _stream(member: torch.Tensor) -> Stream:
    counts = member.sum(dim=1)
    length = int(counts.max())
    # A stable sort keeps positions ascending and puts the members of every row first.
    index = torch.argsort((~member).to(torch.uint8), dim=1, stable=True)[:, :length]
    mask = torch.arange(length, device=member.device) < counts.unsqueeze(1)
    if bool(mask.all()):
        return Stream(index, None, shared=bool((index == index[:1]).all()))
    return Stream(index.masked_fill(~mask, 0), mask, shared=False)
