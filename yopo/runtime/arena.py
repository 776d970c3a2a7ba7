"""Memory that is used for one thing after another."""

from __future__ import annotations

import math

import torch

CHUNK_BYTES = 64 << 20
"""Bytes allocated at a time, more if a tensor needs more."""

ALIGNMENT = 256
"""Bytes to a multiple of which tensors are spaced."""


class Arena:
    """Tensors side by side in a few chunks of memory, which the next user gets as well.

    The chunks live as long as the arena or a tensor in them.
    """

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        self.reuse()

    def reuse(self) -> None:
        """Begin anew: tensors to come may lie where earlier ones lie."""
        self._number, self._used = 0, 0

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """An uninitialized contiguous tensor of another's size, dtype and device."""
        size = math.prod(tensor.shape) * tensor.element_size()
        while self._number < len(self._chunks) and self._room < size:
            self._number, self._used = self._number + 1, 0
        if self._number == len(self._chunks):
            room = max(CHUNK_BYTES, size)
            self._chunks.append(torch.empty(room, dtype=torch.uint8, device=tensor.device))
        start = self._used
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        own = self._chunks[self._number][start : start + size]
        return own.view(tensor.dtype).view(tensor.shape)

    @property
    def _room(self) -> int:
        return len(self._chunks[self._number]) - self._used
