"""Where one kind of token stands in a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
