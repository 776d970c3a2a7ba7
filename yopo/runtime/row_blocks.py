"""Token-wise operations, done a block of rows at a time, with sums in place.

Visual tokens are many and do little. For thousands of them every full-width temporary is freshly
allocated, and its page faults cost a CPU more than computing a norm or a residual sum. The
temporaries of a block are small enough to be reused by the next one. Norms and rotations need fewer
rows than products do: they go through a block in pieces that fit a core's cache. Devices whose
allocators keep memory process all rows at once, as more calls would cost more there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from yopo.runtime import few_calls

BLOCK_BYTES = 16 << 20
"""Most bytes of full-width rows per block: 1024 tokens of 4096 float32 numbers."""

PIECE_BYTES = 1 << 20
"""Most bytes per piece of a block: 64 such tokens."""

Place = tuple[slice, slice]
"""A block of a (batch, length, width) tensor: batch rows, and positions in them."""


def blocks(states: torch.Tensor, most: int | None = None) -> Iterator[Place]:
    """Cut (batch, length, width) states into blocks that are contiguous if the states are.

    A block is a part of one batch row, or as many whole batch rows as fit; the parts of a row have
    equal lengths, give or take a token, as products of few rows are slow. Off the CPU, and where
    gradients are recorded, everything is one block.

    Args:
        states: The tensor to cut.
        most: Most bytes of a block; None: ``BLOCK_BYTES``.
    """
    batch, length, width = states.shape
    size = max(1, (BLOCK_BYTES if most is None else most) // (width * states.element_size()))
    if batch * length <= size or _is_whole(states):
        yield slice(None), slice(None)
        return
    step = max(1, size // length)
    parts = -(-length // size)
    for first in range(0, batch, step):
        for part in range(parts):
            place = slice(part * length // parts, (part + 1) * length // parts)
            yield slice(first, first + step), place


def _is_whole(states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() or few_calls.preferred_on(states.device)


def add(
    states: torch.Tensor, change: Callable[[torch.Tensor, Place], torch.Tensor]
) -> torch.Tensor:
    """``states + change(states)``, block by block; in place where no gradient is recorded.

    Args:
        states: (batch, length, width); overwritten, so not to be used afterwards.
        change: Maps a block and its place to what is added to it.
    """
    if torch.is_grad_enabled():
        return states + change(states, (slice(None), slice(None)))
    for place in blocks(states):
        block = states[place]
        block += change(block, place)
    return states


def replace(states: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``function(states)`` of the same shape, piece by piece; in place as in :func:`add`."""
    if torch.is_grad_enabled():
        return function(states)
    for place in blocks(states, PIECE_BYTES):
        states[place] = function(states[place])
    return states


def mapped(states: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``function(states)`` of the same shape, piece by piece; ``states`` are left unchanged."""
    pieces = list(blocks(states, PIECE_BYTES))
    if len(pieces) == 1:
        return function(states)
    found = torch.empty_like(states)
    for place in pieces:
        found[place] = function(states[place])
    return found
