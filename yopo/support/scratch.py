"""Scratch directories: an unfinished result is kept in a locked directory next to its target.

``.NAME.yopo-xxxxxxxx`` holds ``new``, which becomes the target, briefly ``old``, the former target,
and ``lock``, which the writing process keeps locked. The kernel releases the locks of a process
however it ends, so a scratch directory that can be locked is a leftover. One with the file ``key``
may be continued by a run that has the same key.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from yopo.support import console
from yopo.support.durable import exchange, sync_directory, sync_file, sync_tree, uninterrupted

_NAME = re.compile(r"\.(?P<target>.+)\.yopo-[0-9a-f]{8}")
_LOCK, _NEW, _OLD, _KEY = "lock", "new", "old", "key"
_NAMES = {_LOCK, _NEW, _OLD, _KEY}
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Scratch:
    """Context manager: a directory next to a target in which it is prepared; removed at the end.

    Args:
        target: The file or directory to create; its parent must exist.
        key: Digest of all that the result depends on. If it is given, a leftover with the same key
            is taken over, with everything in ``new``; only one process can.
    """

    def __init__(self, target: Path, *, key: str | None = None):
        self.target = target
        self._key = key
        self._folder: Path | None = None
        self._lock: int | None = None

    @property
    def new(self) -> Path:
        """Path of the future target; the caller creates it, as a file or as a directory."""
        return self._held / _NEW

    @property
    def _held(self) -> Path:
        """The scratch directory; it only exists inside the block."""
        assert self._folder is not None, "a Scratch is used inside its with block"
        return self._folder

    def __enter__(self) -> Scratch:
        try:
            with uninterrupted():
                if not self._continue():
                    self._claim()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with uninterrupted():  # a second Ctrl-C also waits until everything is removed
            self._remove()

    def place_file(self) -> None:
        """Replace the target with ``new``, a file."""
        sync_file(self.new)
        with uninterrupted():
            os.replace(self.new, self.target)
            sync_directory(self.target.parent)

    def place_directory(self, *, check: Callable[[], bool]) -> None:
        """Replace the target with ``new``, a directory; the old one is removed with the scratch.

        Everything is on disk before it gets the target's name, and it has the name before the old
        directory is removed.

        Args:
            check: Called after the last wait: raises if the target may not be replaced; returns
                whether there is anything to replace.
        """
        sync_tree(self.new)
        with uninterrupted():
            if self._key is not None:
                # From here on ``new`` may be the former target, which nobody may continue.
                (self._held / _KEY).unlink()
                sync_directory(self._held)
            if not check():
                os.rename(self.new, self.target)
            elif not exchange(self.new, self.target):
                self._swap()
            sync_directory(self._held)
            sync_directory(self.target.parent)

    def _swap(self) -> None:
        """Like ``exchange``, but the target is briefly missing; ``remove_leftover`` restores it."""
        old = self._held / _OLD
        os.rename(self.target, old)
        try:
            os.rename(self.new, self.target)
        except BaseException:
            os.rename(old, self.target)
            raise

    def _continue(self) -> bool:
        """Take over a leftover with the same key, if there is one."""
        if self._key is None:
            return False
        for folder in _with_key(self.target, self._key):
            lock = _take_over(folder)
            if lock is None:
                continue
            try:  # unless its process finished, or another removed it, before it was locked
                is_here = _has_key(folder, self._key) and _is_at(lock, folder / _LOCK)
            except FileNotFoundError:
                is_here = False
            if is_here:
                self._folder, self._lock = folder, lock
                return True
            os.close(lock)
        return False

    def _claim(self) -> None:
        while True:
            folder = self.target.with_name(f".{self.target.name}.yopo-{secrets.token_hex(4)}")
            folder.mkdir()
            self._folder = folder
            try:
                self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                if try_lock(self._lock) and _is_at(self._lock, folder / _LOCK):
                    self._write_key()
                    return
            except FileNotFoundError:  # removed as a leftover by another process before the lock
                pass
            self._remove()

    def _write_key(self) -> None:
        if self._key is not None:
            (self._held / _KEY).write_text(self._key, encoding="ascii")
            sync_file(self._held / _KEY)
            sync_directory(self._held)
            sync_directory(self.target.parent)

    def _remove(self) -> None:
        if self._folder is not None and not _remove(self._folder):
            console.warn(f"{self._folder}: cannot be removed completely.")
        if self._lock is not None:
            os.close(self._lock)
        self._folder = self._lock = None


def find_leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Scratch directories that killed runs left in a folder.

    Args:
        folder: Where to look.
        name: A target's name, to find only its leftovers.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            match = _NAME.fullmatch(entry.name)
            if match and name in (None, match["target"]) and _is_ours(entry):
                lock = _take_over(Path(entry.path))
                if lock is not None:
                    found.append(Path(entry.path))
                    os.close(lock)
    return found


def find_resumable(target: Path, key: str) -> Path | None:
    """The directory in which a killed run with the same key was writing a target."""
    left = find_leftovers(target.parent, target.name)
    return next((path / _NEW for path in _with_key(target, key) if path in left), None)


def _with_key(target: Path, key: str) -> list[Path]:
    """This user's scratch directories of a target that have a key, locked or not."""
    with os.scandir(target.parent) as entries:
        found = [
            Path(entry.path)
            for entry in sorted(entries, key=lambda entry: entry.name)
            if (match := _NAME.fullmatch(entry.name))
            and match["target"] == target.name
            and _is_ours(entry)
        ]
    return [path for path in found if _has_key(path, key)]


def _has_key(folder: Path, key: str) -> bool:
    try:
        text = (folder / _KEY).read_text(encoding="ascii")
    except (OSError, ValueError):
        return False
    return text == key and not os.path.lexists(folder / _OLD)


def report_leftovers(target: Path, key: str | None = None) -> None:
    """Note the scratch directories that killed runs left of a target, and how to remove them.

    Args:
        target: The file or directory to create.
        key: That of this run: it continues such a leftover, so nothing needs to be said of it.
    """
    for path in find_leftovers(target.parent, target.name):
        if key is not None and _has_key(path, key):
            continue
        kept = "; it holds the previous result" if _holds_the_only_copy(path) else ""
        console.note(
            f"{path}: left by a run that was killed{kept}.",
            f"  `yopo apply --clean {target.parent}` tidies up.",
        )


def remove_leftover(path: Path) -> Path | None:
    """Remove a directory from ``find_leftovers``, unless a process holds it after all.

    Returns:
        The target, if the leftover held its only copy and it was restored.

    Raises:
        OSError: Something in it cannot be removed.
    """
    lock = _take_over(path)
    if lock is None:
        raise BlockingIOError(errno.EBUSY, "A process is writing to it", str(path))
    try:
        restored = _target_of(path) if _holds_the_only_copy(path) else None
        if not _remove(path):
            raise OSError(errno.EACCES, "Cannot be removed completely", str(path))
        return restored
    finally:
        os.close(lock)


def _target_of(path: Path) -> Path:
    match = _NAME.fullmatch(path.name)
    assert match is not None, f"{path} is not a scratch directory"
    return path.with_name(match["target"])


def _holds_the_only_copy(path: Path) -> bool:
    """Whether its process was killed between the two renames of ``_swap``."""
    return (path / _OLD).exists() and not os.path.lexists(_target_of(path))


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Whether a directory is this user's and holds nothing but what ``Scratch`` creates."""
    if not entry.is_dir(follow_symlinks=False):
        return False
    try:
        owner = entry.stat(follow_symlinks=False).st_uid
        names = set(os.listdir(entry.path))
    except OSError:  # not readable, or removed in the meantime
        return False
    # The lock is created first and removed last.
    return owner == os.geteuid() and (not names or {_LOCK} <= names <= _NAMES)


def _take_over(path: Path) -> int | None:
    """Lock a scratch directory; None if its process is alive or if that is unknown."""
    flags = os.O_RDWR | os.O_NOFOLLOW
    try:
        if not os.listdir(path):  # killed before it had a lock
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        lock = os.open(path / _LOCK, flags)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or on a file system without locks
        os.close(lock)
        return None
    return lock


def try_lock(lock: int, *, is_shared: bool = False) -> bool:
    """Lock an open file for this process; false if another has, true where there are no locks.

    Args:
        lock: Its descriptor.
        is_shared: Whether others may lock it likewise, as those who only look do.
    """
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS  # then it is never mistaken for a leftover either
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    return os.path.samestat(os.fstat(file), os.stat(path))


def _remove(folder: Path) -> bool:
    """Remove a scratch directory, its lock last; return whether it is completely gone.

    If the target is missing, the old one is restored first.
    """
    if _holds_the_only_copy(folder):
        _quietly(lambda: os.rename(folder / _OLD, _target_of(folder)))
        if _holds_the_only_copy(folder):
            return False
        _quietly(lambda: sync_directory(folder.parent))
    for part in (folder / _KEY, folder / _NEW, folder / _OLD):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            _quietly(part.unlink)
    if not folder.exists():
        return True
    if set(os.listdir(folder)) <= {_LOCK}:
        _quietly((folder / _LOCK).unlink)
        _quietly(folder.rmdir)
    return not folder.exists()


def _quietly(step: Callable[[], None]) -> None:
    try:
        step()
    except OSError:  # the caller checks what is left
        pass
