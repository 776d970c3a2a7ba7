"""Work that is done token by token, a block of rows at a time, sums in place.

Visual tokens are many and do little. Over thousands of them every full-width temporary is fresh
memory, and the page faults of fresh memory cost a CPU more than a norm or a residual sum computes.
The temporaries of a block are small enough to be used again by the next one. Products want more
rows than norms and rotations do: those go through a block in pieces that stay in the cache of a
core. Devices whose allocators keep memory take all rows at once: there, more calls would cost more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

BLOCK_BYTES = 16 << 20
"""Of full-width rows per block, at most: 1024 tokens of 4096 float32 numbers."""

PIECE_BYTES = 1 << 20
"""Of full-width rows per piece of a block: 64 such tokens."""

Place = tuple[slice, slice]
"""A block of a (batch, length, width) tensor: batch rows, and positions in them."""


def blocks(states: torch.Tensor, most: int | None = None) -> Iterator[Place]:
    """Cut (batch, length, width) states into blocks that are contiguous if the states are.

    A block is a part of one batch row, or as many whole batch rows as fit; the parts of a row are
    equally long, give or take a token, as products of few rows are slow. One block holds everything
    off the CPU, and where gradients are recorded.

    Args:
        states: What is to be cut.
        most: Bytes of a block; None: ``BLOCK_BYTES``.
    """
    batch, length, width = states.shape
    size = max(1, (BLOCK_BYTES if most is None else most) // (width * states.element_size()))
    if batch * length <= size or states.device.type != "cpu" or torch.is_grad_enabled():
        yield slice(None), slice(None)
        return
    step = max(1, size // length)
    parts = -(-length // size)
    for first in range(0, batch, step):
        for part in range(parts):
            place = slice(part * length // parts, (part + 1) * length // parts)
            yield slice(first, first + step), place


def add(
    states: torch.Tensor, change: Callable[[torch.Tensor, Place], torch.Tensor]
) -> torch.Tensor:
    """``states + change(states)``, block by block; in place where no gradient is recorded.

    Args:
        states: (batch, length, width); nobody else may need them afterwards.
        change: Takes a block and its place, returns what to add to it.
    """
    if torch.is_grad_enabled():
        return states + change(states, (slice(None), slice(None)))
    for place in blocks(states):
        block = states[place]
        block += change(block, place)
    return states


def replace(states: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``function(states)`` of the same shape, likewise."""
    if torch.is_grad_enabled():
        return function(states)
    for place in blocks(states, PIECE_BYTES):
        states[place] = function(states[place])
    return states


def mapped(states: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``function(states)`` of the same shape, computed piece by piece; ``states`` stay."""
    pieces = list(blocks(states, PIECE_BYTES))
    if len(pieces) == 1:
        return function(states)
    found = torch.empty_like(states)
    for place in pieces:
        found[place] = function(states[place])
    return found
