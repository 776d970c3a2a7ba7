"""Checks after a copy: the source did not change, and the result reads back correctly.

Changes to the source are detected only by times and sizes, since reading all of it again would
double the work. The result is compared with the source at some places of every tensor, in the order
that it should have: a copy from the wrong place, a lost write, or an undetected change of the
source shows at most of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from yopo.checkpoint.headers import Shard, TensorEntry
from yopo.checkpoint.shards import Reorder
from yopo.support.errors import CheckpointError, OutputError

PLACES = 16
"""Number of places of a tensor that are compared, including the first and the last."""

_PIECE = 4096
"""Bytes compared per place of a tensor that was copied unchanged."""

State = Mapping[str, tuple[int, int, int]]
"""Path inside a directory -> (size, modification time in ns, inode)."""


def source_state(folder: str | Path) -> State:
    """The state of a checkpoint directory's files, which shows whether one was written to."""
    state = {}
    for pattern in ("*", "additional_chat_templates/*"):
        for path in Path(folder).glob(pattern):
            if path.is_file():
                found = path.stat()  # follows links, as in a hub cache
                name = str(path.relative_to(folder))
                state[name] = (found.st_size, found.st_mtime_ns, found.st_ino)
    return state


def check_unchanged(names: Iterable[str], before: State, after: State) -> None:
    """Compare two states of a source, taken around its copy.

    Args:
        names: The files that were read.
        before: State before the first of them was opened.
        after: State after the copy.

    Raises:
        CheckpointError: A file was written to, removed or added.
    """
    for name in sorted(names):
        if before.get(name) != after.get(name):
            raise CheckpointError(
                f"{name}: this file of the source changed while it was copied.",
                remedy="Make sure that nothing else writes to the source, and run again.",
            )


def compare_shard(
    source: Path, target: Path, shard: Shard, reorders: Mapping[str, Reorder]
) -> None:
    """Compare a written shard with its source, at some places of every tensor.

    Args:
        source: The source's directory.
        target: The written directory.
        shard: The file in both.
        reorders: Tensor name -> how it was permuted.

    Raises:
        OutputError: The bytes at a place differ.
    """
    with (source / shard.file).open("rb") as old, (target / shard.file).open("rb") as new:
        for entry in shard.tensors:
            for expected, start in _expected(old.fileno(), entry, reorders.get(entry.name)):
                if os.pread(new.fileno(), len(expected), start) != expected:
                    raise OutputError(
                        f"{target / shard.file}: '{entry.name}' reads back differently from what "
                        "was written.",
                        remedy="The disk may be failing, or something wrote to the source; run "
                        "again.",
                    )
        start = min((entry.start for entry in shard.tensors), default=shard.size)
        if os.pread(new.fileno(), start, 0) != os.pread(old.fileno(), start, 0):
            raise OutputError(f"{target / shard.file}: its header reads back differently.")


def _expected(
    source: int, entry: TensorEntry, reorder: Reorder | None
) -> Iterator[tuple[bytes, int]]:
    """(expected bytes, position) for some places of a tensor."""
    if entry.num_bytes == 0:
        return
    if reorder is None:
        size = min(_PIECE, entry.num_bytes)
        for place in _places(entry.num_bytes - size + 1):
            yield os.pread(source, size, entry.start + place), entry.start + place
        return
    units = len(reorder.order)
    if reorder.axis == 0:
        size = entry.num_bytes // units
        for place in _places(units):
            old = entry.start + int(reorder.order[place]) * size
            yield os.pread(source, size, old), entry.start + place * size
        return
    size = entry.num_bytes // entry.shape[0]
    for row in _places(entry.shape[0]):
        start = entry.start + row * size
        data = np.frombuffer(os.pread(source, size, start), np.uint8)
        yield data.reshape(units, -1)[reorder.order].tobytes(), start


def _places(count: int) -> list[int]:
    """At most ``PLACES`` evenly spread numbers below ``count``, including first and last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, PLACES)})
