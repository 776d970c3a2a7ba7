"""Writes a directory atomically; once it is there, it survives a power cut.

Everything is written to a hidden directory next to the target, synced, and renamed to the target in
one step at the end; only then is the old directory removed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yopo.checkpoint.manifest import MANIFEST_FILE, find_strangers, write_manifest
from yopo.support.errors import OutputError
from yopo.support.scratch import Scratch, find_resumable, report_leftovers

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Resume:
    """What lets a run continue a killed one.

    Attributes:
        key: Digest of all that the result depends on.
        num_bytes: Directory -> bytes in it that need not be written again.
    """

    key: str
    num_bytes: Callable[[Path], int]


class OutputDirectory:
    """Context manager that yields a fresh directory and turns it into the target on success.

    On any exception, KeyboardInterrupt included, the fresh directory is removed and the target is
    as it was. With ``resume``, the directory may be that of a killed run with the same key, with
    what that had written.

    Args:
        target: The directory to create; its parent must exist.
        source: A directory that is only read; the target must not overlap with it.
        num_bytes: Expected size of the output, to check the free space.
        force: Whether a target that yopo wrote, unchanged since, may be replaced.
        resume: What lets it continue a killed run.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        source: str | Path,
        num_bytes: int,
        force: bool,
        resume: Resume | None = None,
    ):
        self.name = str(target)
        # If the target is a link, write next to the directory that it leads to.
        self.target = Path(target).expanduser().resolve()
        self.source = Path(source).expanduser().resolve()
        self.num_bytes = num_bytes
        self.force = force
        self.resume = resume
        self._is_checked = False
        self._work: AbstractContextManager[Path]

    def check(self) -> None:
        """Raise OutputError for every problem that can be detected before writing."""
        target, source = self.target, self.source
        if target == source:
            raise OutputError(f"{self.name}: is the source checkpoint itself.", remedy=_ELSEWHERE)
        if target.is_relative_to(source) or source.is_relative_to(target):
            place = "inside" if target.is_relative_to(source) else "a parent of"
            raise OutputError(f"{self.name}: is {place} the source {source}.", remedy=_ELSEWHERE)
        if not target.parent.is_dir():
            raise OutputError(f"{self.name}: its folder does not exist.")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{self.name}: its folder is not writable.")
        self._check_existing()
        if not self._is_checked:
            report_leftovers(target, self._key)
        self._is_checked = True
        free = shutil.disk_usage(target.parent).free
        needed = self.num_bytes - self._num_bytes_there()
        if free < needed:
            raise OutputError(
                f"{self.name}: needs {format_bytes(needed)}, but its file system has "
                f"{format_bytes(free)} left.",
                remedy="Free some space, or write to another file system.",
            )

    @property
    def _key(self) -> str | None:
        return self.resume.key if self.resume else None

    def _num_bytes_there(self) -> int:
        """Bytes that a killed run wrote and this one continues with."""
        if self.resume is None:
            return 0
        found = find_resumable(self.target, self.resume.key)
        return self.resume.num_bytes(found) if found else 0

    def _check_existing(self) -> bool:
        """Whether there is something to replace; raises if it may not be replaced."""
        target = self.target
        if target.exists() and not target.is_dir():
            raise OutputError(f"{self.name}: is a file, expected a directory name.")
        if _is_absent_or_empty(target):
            return False
        if not self.force:
            raise OutputError(
                f"{self.name}: exists already and is not empty.",
                remedy="Use --force to replace it, or name another directory.",
            )
        strangers = find_strangers(target)
        if strangers is None:
            raise OutputError(
                f"{self.name}: was not written by yopo (it has no {MANIFEST_FILE}), so it is not "
                "replaced even with --force.",
                remedy="Name another directory, or remove this one yourself.",
            )
        if strangers:
            more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
            raise OutputError(
                f"{self.name}: contains files that yopo did not write, or that changed since: "
                f"{', '.join(strangers[:3])}{more}.",
                remedy="Move them elsewhere first, or name another directory.",
            )
        return True

    def __enter__(self) -> Path:
        self._work = self._writing()
        return self._work.__enter__()

    def __exit__(self, *failure: Any) -> bool | None:
        return self._work.__exit__(*failure)

    @contextmanager
    def _writing(self) -> Iterator[Path]:
        self.check()
        try:
            with Scratch(self.target, key=self._key) as scratch:
                # mkdtemp would make it private to the user; mkdir follows the umask.
                scratch.new.mkdir(exist_ok=True)
                yield scratch.new
                write_manifest(scratch.new)
                scratch.place_directory(check=self._check_existing)
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> OutputError:
        if error.errno in _DISK_FULL:
            return OutputError(
                f"{self.name}: disk full while writing; nothing was left behind.",
                remedy=f"Free {format_bytes(self.num_bytes)}, or write to another file system.",
            )
        where = f" ({error.filename})" if error.filename else ""  # possibly a file of the source
        return OutputError(f"{self.name}: cannot be written: {error.strerror or error}{where}.")


_ELSEWHERE = "Write to a directory next to the source."


def _is_absent_or_empty(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def format_bytes(num_bytes: int) -> str:
    """Human-readable size in decimal units: ``13.5 GB``."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
