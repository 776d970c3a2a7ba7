"""Where the states of a calibration's pairs wait while other pairs pass a layer.

A walk needs one batch on the device at a time. Where the decoder is in memory the states stay on
its device. Where its layers are fetched one by one, little else fits there either: states wait in
host memory, or in files, of which the system keeps in memory what there is room for.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import nn

from yopo.models.offloaded import is_offloaded
from yopo.support.errors import OutputError


class Room(Protocol):
    """A place for states."""

    def put(self, states: torch.Tensor, over: torch.Tensor | None = None) -> torch.Tensor:
        """Store states, and return them as they are stored.

        Args:
            states: Of any size, on any device.
            over: What was put here before and is not needed any more; its place may be reused.
        """


class OnDevice:
    """States stay where they are computed."""

    def put(self, states: torch.Tensor, over: torch.Tensor | None = None) -> torch.Tensor:
        """The states themselves."""
        return states


class InHostMemory:
    """States wait in host memory, pinned where that speeds up the way to a device."""

    def put(self, states: torch.Tensor, over: torch.Tensor | None = None) -> torch.Tensor:
        """A copy, unless the device is the host."""
        if states.device.type == "cpu":
            return states
        if over is None or not _is_alike(over, states) or over.device.type != "cpu":
            pinned = states.device.type == "cuda"
            over = torch.empty(states.shape, dtype=states.dtype, pin_memory=pinned)
        return over.copy_(states)


class InFiles:
    """States wait in mapped files, which are gone when the process is, however it ends.

    Args:
        folder: Where the files are made; they have no names there.

    Raises:
        OutputError: (:meth:`put`) The disk is full.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        # Held by the states in them alone, so a file goes with the last of these.
        self._maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()

    def put(self, states: torch.Tensor, over: torch.Tensor | None = None) -> torch.Tensor:
        """A copy in a file; the pages of it leave this process's memory."""
        if over is None or not _is_alike(over, states) or over.data_ptr() not in self._maps:
            over = self._new(states)
        if over.data_ptr() != states.data_ptr():
            over.copy_(states)
        self._maps[over.data_ptr()].madvise(mmap.MADV_DONTNEED)
        return over

    def _new(self, states: torch.Tensor) -> torch.Tensor:
        size = max(states.numel() * states.element_size(), 1)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                _reserve(file.fileno(), size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OutputError(
                f"{self._folder}: no room for the states of the pairs: {error.strerror or error}.",
                remedy="Free some space, or use fewer --fit-pairs, or another --work-dir.",
            ) from error
        made = torch.frombuffer(mapped, dtype=states.dtype, count=states.numel())
        self._maps[made.data_ptr()] = mapped
        return made.view(states.shape)


def _reserve(file: int, size: int) -> None:
    """Give a file its size, on disk: without, a full disk would end the process where it writes to
    the mapped memory."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def room_for(model: nn.Module, folder: str | Path | None) -> Room:
    """Where the states of a model wait: on its device, unless weights are kept elsewhere.

    Args:
        model: A model, or its decoder; in memory or with offloaded layers.
        folder: For files; None: states wait in host memory.
    """
    if not is_offloaded(model):
        return OnDevice()
    return InHostMemory() if folder is None else InFiles(folder)


def _is_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype
