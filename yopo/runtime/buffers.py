"""What one side of a cache layer holds: keys or values of some KV heads, visual ones first.

Text is kept in the model's numbers. Visual entries lie in front of it in the same buffer, or in few
bits beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Self

import torch

from yopo.plans.kv_storage import group_width, packed_width
from yopo.runtime import quantised

HEADROOM = 64
"""Positions allocated ahead when a decode step outgrows a buffer (an eighth of it if more)."""

Cells = tuple[slice, slice, slice]
"""A place in (batch, heads, length, head_dim) entries: batch rows, heads, positions."""


class GrowingBuffer:
    """A (batch, heads, length, head_dim) tensor that grows along ``length`` without copying.

    The first append adopts the tensor itself; later ones write into spare capacity.
    """

    def __init__(self, first: torch.Tensor):
        self._data = first
        self._length = first.shape[2]

    @property
    def view(self) -> torch.Tensor:
        """The filled part."""
        return self._data.narrow(2, 0, self._length)

    def append(self, values: torch.Tensor) -> None:
        """Add (batch, heads, new, head_dim) values at the end."""
        end = self._length + values.shape[2]
        if end > self._data.shape[2]:
            batch, heads, _, head_dim = values.shape
            room = end + max(HEADROOM, end // 8)
            grown = values.new_empty(batch, heads, room, head_dim)
            grown[:, :, : self._length] = self.view
            self._data = grown
        self._data[:, :, self._length : end] = values
        self._length = end

    def open(self, position: int, count: int) -> torch.Tensor:
        """Insert ``count`` uninitialized entries before ``position`` and return them; one copy."""
        batch, heads, _, head_dim = self._data.shape
        grown = self._data.new_empty(batch, heads, self._length + count, head_dim)
        if position:
            grown[:, :, :position] = self.view[:, :, :position]
        grown[:, :, position + count :] = self.view[:, :, position:]
        self.replace(grown)
        return grown.narrow(2, position, count)

    def replace(self, data: torch.Tensor) -> None:
        """Replace the contents."""
        self._data, self._length = data, data.shape[2]

    def shorten(self, count: int) -> None:
        """Forget the last ``count`` positions."""
        self._length -= count


class Entries:
    """Keys or values of some KV heads in the model's numbers, visual ones before text.

    Args:
        text: (batch, heads, text, head_dim), the first ones.
    """

    def __init__(self, text: torch.Tensor):
        self._buffer = GrowingBuffer(text)
        self.num_visual = 0

    def append(self, text: torch.Tensor) -> None:
        """Add (batch, heads, new, head_dim) entries of text."""
        self._buffer.append(text)

    def make_room(self, count: int) -> Room:
        """Room for ``count`` visual entries after those of earlier images."""
        opened = self._buffer.open(self.num_visual, count)
        self.num_visual += count
        return Room(opened)

    def tensors(self) -> list[torch.Tensor]:
        """What holds them."""
        return [self._buffer.view]

    def on(self, tensors: Iterator[torch.Tensor]) -> Self:
        """The same, held by the next of some tensors: such as ``tensors`` lists."""
        other = copy(self)
        other._buffer = GrowingBuffer(next(tensors))
        return other

    @property
    def all(self) -> torch.Tensor:
        """(batch, heads, visual + text, head_dim)."""
        return self._buffer.view

    @property
    def text(self) -> torch.Tensor:
        """(batch, heads, text, head_dim)."""
        return self._buffer.view[:, :, self.num_visual :]

    @property
    def reads_in_blocks(self) -> bool:
        """Whether ``scores`` and ``mixture`` save unpacking all entries at once."""
        return False

    def visual_bytes(self) -> int:
        """Bytes of the visual entries."""
        return self.all[:, :, : self.num_visual].nbytes

    def shorten(self, count: int) -> None:
        """Forget the last ``count`` positions of text."""
        self._buffer.shorten(count)

    def select(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) batch rows."""
        self._buffer.replace(_rows(self._buffer.view, rows))

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """(batch, heads, queries, visual + text) products with queries (..., head_dim)."""
        return queries @ self.all.to(queries.dtype).transpose(-1, -2)

    def mixture(self, weights: torch.Tensor) -> torch.Tensor:
        """(batch, heads, queries, head_dim) sums under weights of the shape of ``scores``."""
        return weights @ self.all.to(weights.dtype)


@dataclass(frozen=True)
class Room:
    """Where visual entries are written, a part at a time: ``room[cells] = values``.

    Attributes:
        entries: (batch, heads, count, head_dim), to be filled.
    """

    entries: torch.Tensor

    def __getitem__(self, cells: Cells) -> Room:
        return Room(self.entries[cells])

    def __setitem__(self, cells: Cells, values: torch.Tensor) -> None:
        self.entries[cells] = values


@dataclass(frozen=True)
class Packing:
    """How visual entries are packed.

    Attributes:
        bits: 8, 4 or 2.
        scale: (heads, 1, head_dim) float32, by which they are divided before; None: by nothing.
    """

    bits: int
    scale: torch.Tensor | None

    def to(self, device: torch.device) -> Packing:
        """The same with its scale on a device."""
        return self if self.scale is None else replace(self, scale=self.scale.to(device))

    def pack(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes and codes of steps of (batch, heads, count, head_dim) values."""
        exact = values.to(quantised.exact_dtype(values.dtype))
        return quantised.quantise(self._scaled(exact, up=False), self.bits)

    def unpack(self, packed: torch.Tensor, steps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The values again, in the numbers of ``like`` (..., head_dim)."""
        exact = quantised.dequantise(packed, steps, self.bits, like.shape[-1], like.dtype)
        return self._scaled(exact, up=True).to(like.dtype)

    def straight_through(self, values: torch.Tensor) -> torch.Tensor:
        """What reading packed values gives, with the gradient of the values themselves."""
        packed, steps = self.pack(values.detach())
        return values + (self.unpack(packed, steps, values) - values).detach()

    def queries(self, queries: torch.Tensor) -> torch.Tensor:
        """(batch, heads, queries, head_dim) for reading packed keys: the scale folded in."""
        return self._scaled(queries, up=True)

    def _scaled(self, values: torch.Tensor, *, up: bool) -> torch.Tensor:
        if self.scale is None:
            return values
        scale = self.scale.to(values.dtype)
        return values * scale if up else values / scale


class PackedEntries(Entries):
    """Entries whose visual ones are quantised as they are written, and stay packed.

    Where gradients are recorded they are held unpacked, each as packing would have made it: bytes
    have no gradient.
    """

    def __init__(self, text: torch.Tensor, packing: Packing):
        super().__init__(text)
        self.packing = packing.to(text.device)
        self._packed: torch.Tensor | None = None
        self._steps: torch.Tensor | None = None

    def make_room(self, count: int) -> Room:
        """Room that quantises what is written."""
        if torch.is_grad_enabled() or (self.num_visual and not self.is_packed):
            self._unpack()
            return StraightRoom(super().make_room(count).entries, self.packing)
        batch, heads, _, head_dim = self.text.shape
        size, new = (batch, heads, count), self._buffer.view.new_empty
        packed = new(*size, packed_width(head_dim, self.packing.bits), dtype=torch.uint8)
        steps = new(*size, head_dim // group_width(head_dim), dtype=torch.uint8)
        if self._packed is not None and self._steps is not None:
            packed = torch.cat([self._packed, packed], dim=2)
            steps = torch.cat([self._steps, steps], dim=2)
        self._packed, self._steps = packed, steps
        place = slice(self.num_visual, self.num_visual + count)
        self.num_visual += count
        return PackingRoom(packed[:, :, place], steps[:, :, place], self.packing)

    def tensors(self) -> list[torch.Tensor]:
        """What holds them."""
        packed = (self._packed, self._steps)
        return super().tensors() + [each for each in packed if each is not None]

    def on(self, tensors: Iterator[torch.Tensor]) -> Self:
        """As for plain entries."""
        other = super().on(tensors)
        if self.is_packed:
            other._packed, other._steps = next(tensors), next(tensors)
        return other

    def _unpack(self) -> None:
        """Hold what is packed in the model's numbers from now on."""
        if self._packed is not None:
            self._buffer.replace(self.all)
            self._packed = self._steps = None

    @property
    def is_packed(self) -> bool:
        """Whether there are packed entries."""
        return self._packed is not None

    @property
    def reads_in_blocks(self) -> bool:
        """Where a head is one group."""
        return self._steps is not None and self._steps.shape[-1] == 1

    @property
    def all(self) -> torch.Tensor:
        """(batch, heads, visual + text, head_dim), unpacked."""
        text = self._buffer.view
        if self._packed is None or self._steps is None:
            return text
        return torch.cat([self.packing.unpack(self._packed, self._steps, text), text], dim=2)

    @property
    def text(self) -> torch.Tensor:
        """(batch, heads, text, head_dim)."""
        return self._buffer.view if self.is_packed else super().text

    def visual_bytes(self) -> int:
        """Bytes of the visual entries, steps included."""
        if self._packed is None or self._steps is None:
            return super().visual_bytes()
        return self._packed.nbytes + self._steps.nbytes

    def select(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) batch rows."""
        super().select(rows)
        if self._packed is not None and self._steps is not None:
            self._packed, self._steps = _rows(self._packed, rows), _rows(self._steps, rows)

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """As for plain entries; packed ones are unpacked block by block."""
        if self._packed is None or self._steps is None or not self.reads_in_blocks:
            return super().scores(queries)
        own = self.packing.queries(queries).flatten(0, 1)
        visual = quantised.scores(
            own, self._packed.flatten(0, 1), self._steps.flatten(0, 1), self.packing.bits
        )
        text = queries @ self.text.to(queries.dtype).transpose(-1, -2)
        return torch.cat([visual.unflatten(0, queries.shape[:2]), text], dim=-1)

    def mixture(self, weights: torch.Tensor) -> torch.Tensor:
        """As for plain entries; packed ones are unpacked block by block."""
        if self._packed is None or self._steps is None or not self.reads_in_blocks:
            return super().mixture(weights)
        visual, text = weights.split([self.num_visual, self.text.shape[2]], dim=-1)
        mixed = quantised.mixture(
            visual.flatten(0, 1),
            self._packed.flatten(0, 1),
            self._steps.flatten(0, 1),
            self.packing.bits,
            self.text.shape[-1],
        )
        return mixed.unflatten(0, weights.shape[:2]) + text @ self.text.to(weights.dtype)


@dataclass(frozen=True)
class StraightRoom(Room):
    """A room in the model's numbers that holds what packing would make of them."""

    packing: Packing

    def __getitem__(self, cells: Cells) -> StraightRoom:
        return StraightRoom(self.entries[cells], self.packing)

    def __setitem__(self, cells: Cells, values: torch.Tensor) -> None:
        self.entries[cells] = self.packing.straight_through(values)


@dataclass(frozen=True)
class PackingRoom(Room):
    """A room of bytes and codes of steps.

    Attributes:
        steps: (batch, heads, count, groups), beside the bytes in ``entries``.
        packing: How values become these.
    """

    steps: torch.Tensor
    packing: Packing

    def __getitem__(self, cells: Cells) -> PackingRoom:
        return PackingRoom(self.entries[cells], self.steps[cells], self.packing)

    def __setitem__(self, cells: Cells, values: torch.Tensor) -> None:
        self.entries[cells], self.steps[cells] = self.packing.pack(values)


def _rows(data: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return data.index_select(0, rows.to(data.device))
