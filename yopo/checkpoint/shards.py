"""Copying a safetensors file with some of its tensors reordered, at nearly the speed of a copy.

Headers, names, dtypes and offsets stay byte for byte: a permutation does not change a size. What is
not reordered is copied by the kernel; what is, passes through memory one tensor at a time (columns
a few rows at a time), always the same memory: fresh pages would cost as much as reading into them.
Values are moved as opaque bytes, so every dtype is exact.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yopo.checkpoint.headers import Shard, TensorEntry
from yopo.errors import CheckpointError

CHUNK = 16 * 2**20
"""Bytes per read or write."""

_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True, eq=False)
class Reorder:
    """How to permute one tensor.

    Attributes:
        order: (units,) int64, new position -> old index.
        axis: 0 for rows (and biases), 1 for columns.
        block: Elements along the axis per unit: ``head_dim`` for heads, 1 for neurons.
    """

    order: np.ndarray
    axis: int
    block: int


@dataclass(frozen=True)
class Step:
    """A range of bytes of a shard: one tensor to reorder, or a run of anything to copy.

    Its length is the number of tensors in it, so that progress counts tensors.
    """

    start: int
    stop: int
    num_tensors: int
    entry: TensorEntry | None = None

    def __len__(self) -> int:
        return self.num_tensors


class Scratch:
    """Two pieces of memory that grow to what is needed and are used again and again."""

    def __init__(self) -> None:
        self._pieces = {"read": np.empty(0, np.uint8), "moved": np.empty(0, np.uint8)}

    def piece(self, name: str, num_bytes: int) -> np.ndarray:
        """(num_bytes,) uint8, overwritten by the next call of this name (``read``, ``moved``)."""
        if len(self._pieces[name]) < num_bytes:
            self._pieces[name] = np.empty(0, np.uint8)  # give back before taking more
            self._pieces[name] = np.empty(num_bytes, np.uint8)
        return self._pieces[name][:num_bytes]

    def take(self, units: np.ndarray, order: np.ndarray, axis: int) -> np.ndarray:
        """The units of an axis in another order."""
        shape = (*units.shape[:axis], len(order), *units.shape[axis + 1 :])
        size = units.itemsize * int(np.prod(shape))
        moved = self.piece("moved", size).view(units.dtype).reshape(shape)
        # Any mode but "raise", whose result numpy buffers once more.
        return units.take(order, axis=axis, out=moved, mode="clip")


def plan_steps(shard: Shard, reorders: Mapping[str, Reorder]) -> list[Step]:
    """Cut a shard into steps that cover it once, from first to last byte."""
    steps = []
    start, pending = 0, 0  # the first run begins with the header
    for entry in shard.tensors:
        if entry.name not in reorders:
            pending += 1
            continue
        if start < entry.start:
            steps.append(Step(start, entry.start, pending))
        steps.append(Step(entry.start, entry.stop, 1, entry))
        start, pending = entry.stop, 0
    if start < shard.size:
        steps.append(Step(start, shard.size, pending))
    return steps


def write_shard(
    source: Path, target: Path, shard: Shard, reorders: Mapping[str, Reorder]
) -> Iterator[Step]:
    """Write a shard's reordered copy, yielding every step when it is done.

    Args:
        source: The shard's file.
        target: A file that does not exist yet.
        shard: What the source holds.
        reorders: Tensor name -> how to permute it; others are copied.

    Raises:
        CheckpointError: The source became shorter than it was.
        OSError: The target cannot be written.
    """
    scratch = Scratch()
    read_from = os.open(source, os.O_RDONLY)
    try:
        write_to = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for step in plan_steps(shard, reorders):
                if step.entry is None:
                    _copy(read_from, write_to, step.start, step.stop, scratch)
                else:
                    _reorder(read_from, write_to, step.entry, reorders[step.entry.name], scratch)
                yield step
        finally:
            os.close(write_to)
    finally:
        os.close(read_from)


def _reorder(
    read_from: int, write_to: int, entry: TensorEntry, reorder: Reorder, scratch: Scratch
) -> None:
    units = len(reorder.order)
    if reorder.axis == 0:  # any row may come first: the whole tensor is needed
        rows = _as_units(_read(read_from, entry.start, entry.stop, scratch), 1, units)[0]
        step = max(1, CHUNK * units // entry.num_bytes)
        position = entry.start
        for first in range(0, units, step):
            part = scratch.take(rows, reorder.order[first : first + step], axis=0)
            position = _write(write_to, part, position)
        return
    num_rows = entry.shape[0]
    row_bytes = entry.num_bytes // num_rows
    step = max(1, CHUNK // row_bytes)
    for first in range(0, num_rows, step):
        last = min(num_rows, first + step)
        start, stop = entry.start + first * row_bytes, entry.start + last * row_bytes
        columns = _as_units(_read(read_from, start, stop, scratch), last - first, units)
        _write(write_to, scratch.take(columns, reorder.order, axis=1), start)


def _as_units(data: np.ndarray, rows: int, units: int) -> np.ndarray:
    """View bytes as (rows, units, words) of the widest integers that a unit is made of."""
    unit_bytes = data.size // (rows * units)
    width = next(width for width in (8, 4, 2, 1) if unit_bytes % width == 0)
    words = data.view(f"u{width}")
    # Without the last axis where it is 1: numpy takes single elements twice as fast.
    return words.reshape((rows, units, -1) if unit_bytes > width else (rows, units))


def _read(file: int, start: int, stop: int, scratch: Scratch) -> np.ndarray:
    data = scratch.piece("read", stop - start)
    view, done = memoryview(data), 0
    while done < len(view):
        count = os.preadv(file, [view[done : done + CHUNK]], start + done)
        if count == 0:
            raise _cut_off()
        done += count
    return data


def _write(file: int, values: np.ndarray, position: int) -> int:
    view = memoryview(values.reshape(-1).view(np.uint8))
    while len(view):
        count = os.pwrite(file, view[:CHUNK], position)
        view, position = view[count:], position + count
    return position


def _copy(read_from: int, write_to: int, start: int, stop: int, scratch: Scratch) -> None:
    in_kernel = hasattr(os, "copy_file_range")
    while start < stop:
        size = min(CHUNK, stop - start)
        if in_kernel:
            try:
                count = os.copy_file_range(read_from, write_to, size, start, start)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                in_kernel = False
                continue
            if count == 0:
                raise _cut_off()
            start += count
        else:
            start = _write(write_to, _read(read_from, start, start + size, scratch), start)


def _cut_off() -> CheckpointError:
    return CheckpointError(
        "A shard of the source became shorter while it was copied.",
        remedy="Let nothing else write to the source checkpoint, and run again.",
    )
