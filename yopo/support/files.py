"""Single output files: checked before the work, written to a scratch file, synced and renamed.

``--force`` only replaces files that yopo wrote itself, each with its own kind: a plan with a plan,
statistics with statistics. Model weights or other inputs are never overwritten.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from yopo.support.errors import OutputError
from yopo.support.scratch import Scratch, report_leftovers

_HEAD = 64 * 1024
"""Number of leading bytes that identify a file's kind."""


@dataclass(frozen=True)
class Kind:
    """A kind of file that yopo writes.

    Attributes:
        name: Name in messages.
        pattern: Found in its first bytes.
    """

    name: str
    pattern: re.Pattern[bytes]

    def is_kind_of(self, path: Path) -> bool:
        """Whether a file is of this kind, or empty (nothing to lose)."""
        with path.open("rb") as file:
            head = file.read(_HEAD)
        return not head or self.pattern.search(head) is not None


PLAN = Kind("a yopo plan", re.compile(rb"^yopo_plan:", re.MULTILINE))
STATISTICS = Kind("yopo statistics", re.compile(rb'\A.{8}\{"__metadata__":\{"yopo":', re.DOTALL))
EVALUATION = Kind("an evaluation", re.compile(rb'\A\s*\{\s*"yopo_evaluation":'))
PAGE_MARK = '<meta name="generator" content="yopo">'
PAGE = Kind("a page that yopo wrote", re.compile(re.escape(PAGE_MARK.encode())))


def check_writable(path: Path, kind: Kind, *, force: bool) -> None:
    """Refuse a file that must not be overwritten, or whose folder cannot be written to.

    Links are not followed: they may lead anywhere, such as to a hub cache's blobs.

    Args:
        path: The file to write.
        kind: Its kind.
        force: Whether a file of the same kind may be replaced.

    Raises:
        OutputError: It cannot or must not be written.
    """
    _check_is_file(path)
    if path.exists():
        if not force:
            raise OutputError(f"{path}: exists already.", remedy="Use --force to replace it.")
        _check_kind(path, kind)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{path}: its folder does not exist.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: its folder is not writable.")
    report_leftovers(path.absolute())


def _check_is_file(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}.") from error
    if stat.S_ISLNK(mode):
        raise OutputError(
            f"{path}: is a link to {os.readlink(path)}, expected a file name.",
            remedy="Name the file itself (for stdout: -), or remove the link.",
        )
    if stat.S_ISDIR(mode):
        raise OutputError(f"{path}: is a directory, expected a file name.")
    if not stat.S_ISREG(mode):
        raise OutputError(
            f"{path}: is a device, a pipe or a socket, expected a file name.",
            remedy="Name a file; a plan can be written to stdout with -.",
        )


def _check_kind(path: Path, kind: Kind) -> None:
    try:
        is_of_kind = kind.is_kind_of(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}.") from error
    if not is_of_kind:
        raise OutputError(
            f"{path}: is not {kind.name}, so it is not replaced even with --force.",
            remedy="Name another file, or remove this one yourself.",
        )


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically; its folder is created if it is missing.

    When this returns, the file survives a power cut. Its permissions follow the user's umask, or
    are those of the file that it replaces.

    Raises:
        OutputError: It cannot be written (such as a full disk); nothing is left behind.
    """
    target = path.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with Scratch(target) as scratch:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with open(os.open(scratch.new, flags, 0o666), "wb") as file:
                file.write(data)
                if target.is_file():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            scratch.place_file()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from error
