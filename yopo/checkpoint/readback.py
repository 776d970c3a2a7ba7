"""After a copy: is the source still what it was, and can what was written be read back?

Only times and sizes say whether other bytes were written to the source meanwhile, as reading all of
it again would double the work. What stands in the result is compared with the source in some places
of every tensor, in the order that it should have: a copy from the wrong place, a write that never
arrived, or a source that changed without a trace shows in most of them.
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
"""Places of a tensor that are compared, its first and its last among them."""

_PIECE = 4096
"""Bytes compared at a place of a tensor that was copied as it is."""

State = Mapping[str, tuple[int, int, int]]
"""Path inside a directory -> (size, modification time in ns, inode)."""


def source_state(folder: str | Path) -> State:
    """What tells whether a file of a directory, or of one inside it, was written to."""
    state = {}
    for pattern in ("*", "additional_chat_templates/*"):
        for path in Path(folder).glob(pattern):
            if path.is_file():
                found = path.stat()  # of what a link leads to, in a hub cache
                name = str(path.relative_to(folder))
                state[name] = (found.st_size, found.st_mtime_ns, found.st_ino)
    return state


def check_unchanged(names: Iterable[str], before: State, after: State) -> None:
    """Compare two states of a source, taken around its copy.

    Args:
        names: The files that were read.
        before: From before the first of them was opened.
        after: From behind the copy.

    Raises:
        CheckpointError: One was written to, removed or added.
    """
    for name in sorted(names):
        if before.get(name) != after.get(name):
            raise CheckpointError(
                f"{name}: this file of the source changed while it was copied.",
                remedy="Let nothing else write to the source checkpoint, and run again.",
            )


def compare_shard(
    source: Path, target: Path, shard: Shard, reorders: Mapping[str, Reorder]
) -> None:
    """Compare a written shard with its source, in some places of every tensor.

    Args:
        source: The source's directory.
        target: The directory that was written.
        shard: The file in both.
        reorders: Tensor name -> how it was permuted.

    Raises:
        OutputError: A place holds other bytes than it should.
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
    """(bytes, where they belong) of some places of a tensor."""
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
    """At most ``PLACES`` numbers below ``count``, evenly spread, with the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, PLACES)})
