"""Copies a safetensors file with some of its tensors reordered, at nearly the speed of a copy.

Headers, names, dtypes and offsets are unchanged byte for byte: a permutation does not change sizes.
Unchanged ranges are copied by the kernel. Columns are permuted a few rows at a time. Reordered rows
are read directly into their new places, after the kernel was asked to read them ahead in file
order: in the new order a disk would take twice the time of a copy. All of this goes through a few
megabytes of reused memory, since fresh pages would cost as much as reading into them. A second
worker reads while the first one writes. Values are moved as opaque bytes, so every dtype is exact;
on the way it is checked that they are finite.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yopo.checkpoint.headers import FLOATS, Shard, TensorEntry
from yopo.checkpoint.values import check_values
from yopo.support.errors import CheckpointError

CHUNK = 4 * 2**20
"""Bytes per read or write; with larger pieces, which leave the processor's cache, the kernel takes
up to twice the time."""

READ_AHEAD = 128 * 2**10
"""Bytes per request to read ahead: the usual limit of a device."""

MIN_READ = 1024
"""Minimum bytes of a row to be read individually; tensors with shorter rows are read whole."""

WORKERS = 2
"""Most threads per shard. Writes to one file are serialized, so more would not help."""

_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True, eq=False)
class Reorder:
    """A permutation of one tensor.

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
    """A byte range of a shard: one tensor to reorder, or any run of bytes to copy.

    Its ``len`` is the number of tensors in it, so that progress counts tensors.
    """

    start: int
    stop: int
    tensors: tuple[TensorEntry, ...]
    reorder: Reorder | None = None

    def __len__(self) -> int:
        return len(self.tensors)


class Scratch(threading.local):
    """Two reusable buffers per thread that grow as needed."""

    def __init__(self) -> None:
        self._pieces = {"read": np.empty(0, np.uint8), "moved": np.empty(0, np.uint8)}

    def piece(self, name: str, num_bytes: int) -> np.ndarray:
        """(num_bytes,) uint8, reused by the next call with this name (``read``, ``moved``)."""
        if len(self._pieces[name]) < num_bytes:
            self._pieces[name] = np.empty(0, np.uint8)  # free before allocating more
            self._pieces[name] = np.empty(num_bytes, np.uint8)
        return self._pieces[name][:num_bytes]


def plan_steps(shard: Shard, reorders: Mapping[str, Reorder]) -> list[Step]:
    """Cut a shard into steps that cover it once, from first to last byte."""
    steps = []
    start, pending = 0, list[TensorEntry]()  # the first run starts with the header
    for entry in shard.tensors:
        if entry.name not in reorders:
            pending.append(entry)
            continue
        if start < entry.start:
            steps.append(Step(start, entry.start, tuple(pending)))
        steps.append(Step(entry.start, entry.stop, (entry,), reorders[entry.name]))
        start, pending = entry.stop, []
    if start < shard.size:
        steps.append(Step(start, shard.size, tuple(pending)))
    return steps


def write_shard(
    source: Path,
    target: Path,
    shard: Shard,
    reorders: Mapping[str, Reorder],
    *,
    workers: int = WORKERS,
) -> Generator[Step, None, None]:
    """Write a shard's reordered copy, yielding each step when it is done, in any order.

    Args:
        source: The shard's file.
        target: A file that does not exist yet.
        shard: The source's header.
        reorders: Tensor name -> its permutation; other tensors are copied.
        workers: Number of threads.

    Raises:
        CheckpointError: The source became shorter, or a value is not finite.
        OSError: The target cannot be written.
    """
    with ExitStack() as files:
        read_from = os.open(source, os.O_RDONLY)
        files.callback(os.close, read_from)
        write_to = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        files.callback(os.close, write_to)
        work = _Work(read_from, write_to, source)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="yopo-bake")
        files.callback(pool.shutdown, cancel_futures=True)
        for done in as_completed(
            [pool.submit(work.do, step) for step in plan_steps(shard, reorders)]
        ):
            yield done.result()


class _Work:
    """State shared by the workers of a shard: two files, read and written by position.

    Every value is checked right after it was read, while it is in memory.
    """

    def __init__(self, read_from: int, write_to: int, path: Path):
        self._source, self._target = read_from, write_to
        self._path = path
        self._scratch = Scratch()

    def do(self, step: Step) -> Step:
        """Do a step."""
        if step.reorder is None:
            self._copy(step)
            return step
        (entry,), order = step.tensors, step.reorder.order
        if step.reorder.axis == 0 and entry.num_bytes >= MIN_READ * len(order):
            self._move_rows(entry, order)
        else:
            # Short rows, mainly biases: like columns of one long row.
            self._move_columns(entry, order, entry.shape[0] if step.reorder.axis else 1)
        return step

    def _move_rows(self, entry: TensorEntry, order: np.ndarray) -> None:
        """Read rows (or heads of rows) in their new order and write them sequentially."""
        _prefetch(self._source, entry.start, entry.stop)
        size = entry.num_bytes // len(order)
        count = max(1, CHUNK // size)
        for first in range(0, len(order), count):
            wanted = order[first : first + count].tolist()
            piece = self._scratch.piece("moved", len(wanted) * size)
            view = piece.data
            for place, row in enumerate(wanted):
                self._read(entry.start + row * size, view[place * size : (place + 1) * size])
            check_values(piece, entry, self._path)
            self._write(piece, entry.start + first * size)

    def _move_columns(self, entry: TensorEntry, order: np.ndarray, num_rows: int) -> None:
        """Read, permute and write some rows at a time."""
        row_bytes = entry.num_bytes // num_rows
        step = max(1, CHUNK // row_bytes)
        for first in range(0, num_rows, step):
            rows, start = min(step, num_rows - first), entry.start + first * row_bytes
            data = self._scratch.piece("read", rows * row_bytes)
            self._read(start, data.data)
            check_values(data, entry, self._path)
            moved = self._scratch.piece("moved", data.size)
            units = _as_units(data, rows, len(order))
            # Any mode but "raise", for which numpy buffers the result again.
            units.take(order, axis=1, out=_as_units(moved, rows, len(order)), mode="clip")
            self._write(moved, start)

    def _copy(self, step: Step) -> None:
        in_kernel = hasattr(os, "copy_file_range")
        for start in range(step.start, step.stop, CHUNK):
            stop = min(start + CHUNK, step.stop)
            in_kernel = in_kernel and self._copy_in_kernel(start, stop)
            if not in_kernel:
                data = self._scratch.piece("read", stop - start)
                self._read(start, data.data)
                self._write(data, start)
            for entry in step.tensors:
                self._check(entry, start, stop)

    def _copy_in_kernel(self, start: int, stop: int) -> bool:
        """Copy a byte range without its passing through this process.

        Returns:
            False, with nothing lost, where kernel or file system cannot do that.
        """
        while start < stop:
            try:
                count = os.copy_file_range(self._source, self._target, stop - start, start, start)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                return False
            if count == 0:
                raise _cut_off()
            start += count
        return True

    def _check(self, entry: TensorEntry, start: int, stop: int) -> None:
        """Check the numbers of a tensor that end within a byte range."""
        if entry.dtype not in FLOATS or entry.stop <= start or entry.start >= stop:
            return
        width = FLOATS[entry.dtype].itemsize
        first = max(0, start - entry.start) // width * width
        last = (min(stop, entry.stop) - entry.start) // width * width
        data = self._scratch.piece("read", last - first)
        self._read(entry.start + first, data.data)
        check_values(data, entry, self._path)

    def _read(self, start: int, into: memoryview) -> None:
        """Fill ``into`` from the source."""
        while len(into):
            count = os.preadv(self._source, [into], start)
            if count == 0:
                raise _cut_off()
            into, start = into[count:], start + count

    def _write(self, data: np.ndarray, start: int) -> None:
        """Write (bytes,) uint8 to the target."""
        view = data.data
        while len(view):
            count = os.pwrite(self._target, view, start)
            view, start = view[count:], start + count


def _prefetch(file: int, start: int, stop: int) -> None:
    """Ask for a byte range in file order, because single rows of a cold file are slow to fetch.

    In small pieces: Linux cuts a longer request off at the device's read-ahead.
    """
    if hasattr(os, "posix_fadvise"):
        for place in range(start, stop, READ_AHEAD):
            size = min(READ_AHEAD, stop - place)
            os.posix_fadvise(file, place, size, os.POSIX_FADV_WILLNEED)


def _as_units(data: np.ndarray, rows: int, units: int) -> np.ndarray:
    """View bytes as (rows, units, words) of the widest integers that divide a unit."""
    unit_bytes = data.size // (rows * units)
    width = next(width for width in (8, 4, 2, 1) if unit_bytes % width == 0)
    words = data.view(f"u{width}")
    # Without the last axis if it is 1: numpy takes single elements twice as fast.
    return words.reshape((rows, units, -1) if unit_bytes > width else (rows, units))


def _cut_off() -> CheckpointError:
    return CheckpointError(
        "A shard of the source became shorter while it was copied.",
        remedy="Make sure that nothing else writes to the source, and run again.",
    )
