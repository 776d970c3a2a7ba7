"""How many forwards may wait at the layers of a decoder together: as many as memory holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import torch

from yopo.models.devices import free_memory
from yopo.plans.schema import ModelShape

STATES = 4
"""States that a waiting forward holds per token: its own, its input, the image's features that are
merged into it, and positions."""

SHARE = 2
"""One part in this many of the free memory goes to forwards that wait; the rest is for the layer
at hand and the forward that computes."""

MOST_TOKENS = {"cpu": 1 << 14}
OTHERWISE = 1 << 17
"""Most tokens of a window, by type of device and elsewhere: computing on as many takes far longer
than reading the layer, so more would take memory and gain nothing. Answers are not limited so: each
of their steps is a token per pair."""

_FORCED: ContextVar[int | None] = ContextVar("yopo_window", default=None)


@contextmanager
def window_of(memory: int) -> Iterator[None]:
    """Have forwards pass layers together, in this many bytes, even where layers are resident."""
    token = _FORCED.set(memory)
    try:
        yield
    finally:
        _FORCED.reset(token)


def forced_memory() -> int | None:
    """The bytes of the surrounding :func:`window_of`, if any."""
    return _FORCED.get()


def free_for_states(device: torch.device) -> int:
    """Bytes of a device's free memory for forwards that wait."""
    free = free_memory(device)
    if free is None:  # a quarter of all memory, where the system does not say what is free
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) // SHARE
    return free // (2 * SHARE)  # weights on their way from disk need some, too


def most_tokens(kind: str) -> int:
    """Tokens of a full window of forwards that generate nothing, on a type of device."""
    return MOST_TOKENS.get(kind, OTHERWISE)


@dataclass(frozen=True)
class Holding:
    """What a forward holds on the device while it waits.

    Attributes:
        shape: The decoder's.
        new_tokens: Tokens that it generates; None: it keeps no keys and values.
    """

    shape: ModelShape
    new_tokens: int | None

    def of(self, states: torch.Tensor) -> int:
        """Bytes at a layer of the decoder, given its (batch, sequence, hidden) input."""
        rows, length, width = states.shape
        numbers = rows * length * STATES * width
        if self.new_tokens is not None:
            per_token = 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim
            numbers += rows * (length + self.new_tokens) * per_token
        mask = rows * length * length
        return numbers * states.element_size() + mask

    def most_tokens(self, device: torch.device) -> int | None:
        """Tokens of a full window on a device; None: as many as memory holds."""
        return most_tokens(device.type) if self.new_tokens is None else None


@dataclass(frozen=True)
class _Held:
    num_bytes: int = 0
    tokens: int = 0


class Load:
    """What the forwards of a window hold, and whether another one fits.

    A forward in a vision tower has not got to the decoder yet. It counts as much as the largest one
    there, so the very first goes there alone.

    Args:
        holding: What each holds at the decoder.
        memory: Bytes for all of them; None: what the device of the first one has.
    """

    def __init__(self, holding: Holding, memory: int | None):
        self._holding, self._memory = holding, memory
        self._largest = _Held()
        self.start()

    def start(self) -> None:
        """Begin a window, of which only the largest forward of the last one is known."""
        self._usual, self._largest, self._here = self._largest, _Held(), _Held()
        self._in_towers: list[int] = []
        self._room, self._most_tokens = self._memory, cast("int | None", None)

    def add(self, states: torch.Tensor) -> None:
        """Count a forward that waits at the decoder with its (batch, sequence, hidden) states."""
        self._find_room(states.device)
        found = _Held(self._holding.of(states), states.shape[:2].numel())
        here, largest = self._here, self._largest
        self._here = _Held(here.num_bytes + found.num_bytes, here.tokens + found.tokens)
        self._largest = max(largest, found, key=lambda each: each.num_bytes)

    def add_in_tower(self, states: torch.Tensor) -> None:
        """Count a forward that waits in a tower with its (..., hidden) states."""
        self._find_room(states.device)
        self._in_towers.append(STATES * states.nbytes)

    def leave_towers(self) -> None:
        """No forward waits in a tower any more: all have been added again."""
        self._in_towers.clear()

    @property
    def is_full(self) -> bool:
        """Whether another forward may take more than the window has; not if it is empty."""
        if self._room is None or not (self._here.tokens or self._in_towers):
            return False
        usual = self._largest if self._here.tokens else self._usual
        if self._in_towers and not usual.tokens:
            return True
        ahead = [max(each, usual.num_bytes) for each in self._in_towers]
        tokens = self._here.tokens + len(ahead) * usual.tokens
        held = self._here.num_bytes + sum(ahead) + max(ahead, default=usual.num_bytes)
        is_long = self._most_tokens is not None and tokens >= self._most_tokens
        return is_long or held > self._room

    def _find_room(self, device: torch.device) -> None:
        if self._room is None:
            self._room = free_for_states(device)
        self._most_tokens = self._holding.most_tokens(device)
