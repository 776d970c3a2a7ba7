"""Work that is done token by token, a block of rows at a time, sums in place.

Visual tokens are many and do little. Over thousands of them every full-width temporary is fresh
memory, and the page faults of fresh memory cost a CPU more than a norm or a residual sum computes.
The temporaries of a block are small enough to be used again by the next one. Devices whose
allocators keep memory take all rows at once: there, more calls would cost more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

BLOCK_BYTES = 8 << 20
"""Of full-width rows per block: 512 tokens of 4096 float32 numbers."""

Place = tuple[slice, slice]
"""A block of a (batch, length, width) tensor: batch rows, and positions in them."""


def blocks(states: torch.Tensor) -> Iterator[Place]:
    """Cut (batch, length, width) states into blocks that are contiguous if the states are.

    A block is a part of one batch row, or as many whole batch rows as fit. One block holds
    everything off the CPU, and where gradients are recorded.
    """
    batch, length, width = states.shape
    size = max(1, BLOCK_BYTES // (width * states.element_size()))
    if batch * length <= size or states.device.type != "cpu" or torch.is_grad_enabled():
        yield slice(None), slice(None)
        return
    step = max(1, size // length)
    for first in range(0, batch, step):
        for start in range(0, length, size):
            yield slice(first, first + step), slice(start, start + size)


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
    for place in blocks(states):
        states[place] = function(states[place])
    return states
