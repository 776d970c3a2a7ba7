"""Writes a checkpoint's shards, several at a time; each gets its name once it is on the disk.

A shard is written as ``NAME.part``, synced and renamed. So a shard that has its name is whole,
also after a power cut, and a run that continues a killed one writes only the others. Syncing each
shard, while others are being written, also lets a slow disk write from the beginning.
"""

from __future__ import annotations

import os
import queue
import shutil
import stat
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import torch

from yopo.checkpoint.headers import Shard
from yopo.checkpoint.reader import Checkpoint
from yopo.checkpoint.shards import WORKERS, Reorder, Step, write_shard
from yopo.support import console
from yopo.support.durable import sync_directory, sync_file
from yopo.support.version import __version__

MOST = 4
"""Maximum number of threads that write at the same time, each with two buffers of a chunk."""

_PART = ".part"


def write_weights(checkpoint: Checkpoint, reorders: Mapping[str, Reorder], folder: Path) -> None:
    """Write all shards to ``folder``, with progress; those that are there are kept.

    Args:
        checkpoint: The source.
        reorders: Tensor name -> its permutation; other tensors are copied.
        folder: New, or with what a killed run wrote of the same shards; all else is removed.

    Raises:
        CheckpointError: A tensor is not finite, or the source became shorter.
        OSError: A shard cannot be written.
    """
    finished = {shard.file for shard in finished_shards(folder, checkpoint.shards)}
    _remove_all_but(folder, finished)
    left = [shard for shard in checkpoint.shards if shard.file not in finished]
    if finished:
        console.note(
            f"Continuing a run that was killed: {len(finished)} of {len(checkpoint.shards)} "
            "shards are written already."
        )
    total = sum(len(shard.tensors) for shard in left)
    with closing(_write_all(checkpoint.path, folder, left, reorders)) as work:
        for _ in console.track(work, label="baking", total=total, unit="tensors"):
            pass


def finished_shards(folder: Path, shards: Iterable[Shard]) -> list[Shard]:
    """The shards that a run finished in a directory before it was killed."""
    return [shard for shard in shards if _is_whole(folder / shard.file, shard.size)]


def key_of(checkpoint: Checkpoint, reorders: Mapping[str, Reorder]) -> str:
    """Digest of all that the written shards depend on: the source's files and the reorders.

    A file is known by place, size, inode and times. That of its last change cannot be set, so a
    file that was written to does not look the same even if ``cp -p`` or ``rsync -t`` did it.
    """
    digest = sha256(__version__.encode())
    for shard in checkpoint.shards:
        path = (checkpoint.path / shard.file).resolve()
        found = path.stat()
        times = (found.st_mtime_ns, found.st_ctime_ns)
        digest.update(repr((str(path), found.st_dev, found.st_ino, shard.size, times)).encode())
    for name, reorder in sorted(reorders.items()):
        digest.update(repr((name, reorder.axis, reorder.block, len(reorder.order))).encode())
        digest.update(reorder.order.tobytes())
    return digest.hexdigest()


def _is_whole(path: Path, size: int) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _remove_all_but(folder: Path, names: set[str]) -> None:
    for path in list(folder.iterdir()):
        if path.name in names:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _threads(num_shards: int) -> tuple[int, int]:
    """Shards to write at a time, and threads for each; in all one per core, from 2 to ``MOST``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    most = min(MOST, max(2, cores))
    lanes = max(1, min(most, num_shards))
    return lanes, max(1, min(WORKERS, most // lanes))


def _write_all(
    source: Path, folder: Path, shards: Sequence[Shard], reorders: Mapping[str, Reorder]
) -> Generator[Step, None, None]:
    """Write shards, yielding each step when it is done; after the first error, or if closed,
    nothing writes on."""
    done: queue.SimpleQueue[Step | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    lanes, workers = _threads(len(shards))
    # In a forked process torch renews its pool at the first use: not in several threads at once.
    torch.set_num_threads(torch.get_num_threads())

    def write(shard: Shard) -> None:
        try:
            part = folder / f"{shard.file}{_PART}"
            steps = write_shard(source / shard.file, part, shard, reorders, workers=workers)
            with closing(steps):
                for step in steps:
                    if stop.is_set():
                        return
                    done.put(step)
            sync_file(part)
            os.rename(part, folder / shard.file)
            sync_directory(folder)
            done.put(None)
        except BaseException as error:
            done.put(error)

    with ThreadPoolExecutor(lanes, thread_name_prefix="yopo-shard") as pool:
        try:
            for shard in shards:
                pool.submit(write, shard)
            left = len(shards)
            while left:
                item = done.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
