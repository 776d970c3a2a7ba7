"""Opening input files safely: only regular files of a bounded size.

A path may come from an untrusted file. A FIFO would block forever, a device would never end, and
files under /proc claim to be regular and empty: they are read as empty.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from yopo.support.errors import YopoError

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path, *, error: type[YopoError]) -> tuple[BinaryIO, int]:
    """Open a regular file for reading, without ever blocking.

    Args:
        path: The file; a symlink is followed.
        error: The exception class to raise.

    Returns:
        (the file, which the caller closes; its size in bytes).

    Raises:
        YopoError: Of class ``error``: the file is missing, not regular, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as missing:
        raise error(f"{path}: no such file.") from missing
    except (OSError, ValueError) as problem:  # a path may hold a zero byte
        raise error(f"{path}: cannot be read: {_reason(problem)}.") from problem
    file = os.fdopen(descriptor, "rb") if _is_regular(descriptor) else None
    if file is not None:
        return file, os.fstat(descriptor).st_size
    mode = os.fstat(descriptor).st_mode
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise error(f"{path}: is a directory, expected a file.")
    kind = _KINDS.get(stat.S_IFMT(mode), "not a file")
    raise error(
        f"{path}: is {kind}, expected a regular file.",
        remedy="Save it as a file first; commands that read from stdin take -.",
    )


def read_bytes(path: str | Path, *, limit: int, error: type[YopoError]) -> bytes:
    """Read a whole regular file.

    Args:
        path: The file.
        limit: Maximum size in bytes; larger files are refused unread.
        error: The exception class to raise.

    Raises:
        YopoError: Of class ``error``: as for :func:`open_regular`, or the file is too long.
    """
    file, size = open_regular(path, error=error)
    with file:
        if size > limit:
            raise error(f"{path}: has {size:,} bytes, more than the limit of {limit:,}.")
        try:
            return file.read(size)
        except OSError as problem:
            raise error(f"{path}: cannot be read: {_reason(problem)}.") from problem


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _reason(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or str(problem)
