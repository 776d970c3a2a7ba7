"""Checks the values of a checkpoint's tensors for NaN while they are copied."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from yopo.checkpoint.headers import FLOATS, TensorEntry
from yopo.support.errors import CheckpointError
from yopo.support.finite import is_finite

CHUNK = 4 << 20
"""Bytes that are checked at once; larger pieces would not fit the processor's cache."""


class FiniteCheck:
    """Checks tensors of one shard, reusing one buffer.

    Args:
        path: The shard's file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._piece = bytearray(CHUNK)

    def check(self, entries: Iterable[TensorEntry]) -> None:
        """Read tensors and refuse the first that is not finite; non-float types pass.

        Raises:
            CheckpointError: Names the tensor.
        """
        with self._path.open("rb", buffering=0) as file:
            for entry in entries:
                if entry.dtype not in FLOATS:
                    continue
                file.seek(entry.start)
                left = entry.num_bytes
                while left:
                    piece = memoryview(self._piece)[: min(CHUNK, left)]
                    count = file.readinto(piece)
                    if count != len(piece):
                        raise CheckpointError(f"{self._path}: became shorter while it was read.")
                    if not is_finite(torch.frombuffer(piece, dtype=FLOATS[entry.dtype])):
                        raise CheckpointError(
                            f"{self._path}: tensor '{entry.name}' holds values that are not finite "
                            "(NaN or infinity).",
                            remedy="The checkpoint is damaged, or its training diverged; no plan "
                            "can fix that.",
                        )
                    left -= count
