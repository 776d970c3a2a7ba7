"""System calls for putting a result in place: sync to disk, atomic exchange, deferred signals."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a program to end but leave it time to clean up."""

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_directory(path: Path) -> None:
    """Wait until a directory's entries (created, renamed or removed) are on disk.

    Network file systems that cannot sync directories write them through, so they are skipped.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(folder)


def sync_tree(folder: Path) -> None:
    """Sync every file below a directory, then the directories, from the leaves up."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in sorted(files):
            sync_file(Path(path, name))
        sync_directory(Path(path))


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically, so that neither is ever missing.

    Returns:
        True on success; False where the kernel or the file system does not support it.

    Raises:
        OSError: It failed for another reason.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP during a short block; they arrive after it.

    Handlers are replaced, because blocking a signal in one thread only sends it to another.
    Only the main thread runs handlers, so in other threads there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    former = {}
    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) or handler == signal.SIG_DFL:  # not if ignored (nohup)
                former[number] = handler
                signal.signal(number, lambda number, frame: arrived.append(number))
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])
