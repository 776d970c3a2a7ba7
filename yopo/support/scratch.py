"""Where a result lies while it is unfinished: a marked and locked directory beside its target.

``.NAME.yopo-xxxxxxxx`` holds ``new``, which becomes the target, for moments ``old``, which was it,
and ``lock``, which the process that writes holds locked. A kernel that ends a process, however it
ends, gives its locks back: what can be locked was left behind, and whoever finds it may say so.
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
_LOCK, _NEW, _OLD = "lock", "new", "old"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Scratch:
    """Context manager: a directory beside a target, in which it is prepared; gone at the end.

    Args:
        target: The file or directory to make; its parent must exist.
    """

    def __init__(self, target: Path):
        self.target = target
        self._folder: Path | None = None
        self._lock: int | None = None

    @property
    def new(self) -> Path:
        """What becomes the target; the caller makes it, as a file or as a directory."""
        return self._held / _NEW

    @property
    def _held(self) -> Path:
        """The scratch directory, which there is inside the block alone."""
        assert self._folder is not None, "a Scratch is used inside its with block"
        return self._folder

    def __enter__(self) -> Scratch:
        try:
            with uninterrupted():
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
        with uninterrupted():  # a second Ctrl-C, too, waits until everything is gone
            self._remove()

    def place_file(self) -> None:
        """Let ``new``, a file, become the target, and what was there vanish."""
        sync_file(self.new)
        with uninterrupted():
            os.replace(self.new, self.target)
            sync_directory(self.target.parent)

    def place_directory(self, *, check: Callable[[], bool]) -> None:
        """Let ``new``, a directory, become the target; what was there goes with this object.

        All of it is on the disk before it has the target's name, and has the name before what
        had it is removed.

        Args:
            check: Asked behind the last wait: raises if the target may not be replaced; returns
                whether there is anything to replace.
        """
        sync_tree(self.new)
        with uninterrupted():
            if not check():
                os.rename(self.new, self.target)
            elif not exchange(self.new, self.target):
                self._swap()
            sync_directory(self._held)
            sync_directory(self.target.parent)

    def _swap(self) -> None:
        """As ``exchange``, but with a moment without a target: ``remove_leftover`` undoes it."""
        old = self._held / _OLD
        os.rename(self.target, old)
        try:
            os.rename(self.new, self.target)
        except BaseException:
            os.rename(old, self.target)
            raise

    def _claim(self) -> None:
        while True:
            folder = self.target.with_name(f".{self.target.name}.yopo-{secrets.token_hex(4)}")
            folder.mkdir()
            self._folder = folder
            try:
                self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                if _try_lock(self._lock) and _is_at(self._lock, folder / _LOCK):
                    return
            except FileNotFoundError:  # somebody took it for a leftover before it was locked
                pass
            self._remove()

    def _remove(self) -> None:
        if self._folder is not None and not _remove(self._folder):
            console.warn(f"{self._folder}: cannot be removed completely.")
        if self._lock is not None:
            os.close(self._lock)
        self._folder = self._lock = None


def find_leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Scratch directories that runs which are no more left in a folder.

    Args:
        folder: Where to look.
        name: A target's name, to find that target's alone.
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


def tell_leftovers(target: Path) -> None:
    """Name what killed runs left of a target, and how to be rid of it."""
    for path in find_leftovers(target.parent, target.name):
        kept = "; it holds the former result" if _holds_the_only_copy(path) else ""
        console.note(
            f"{path}: left by a run that was killed{kept}.",
            f"  `yopo apply --clean {target.parent}` tidies up.",
        )


def remove_leftover(path: Path) -> Path | None:
    """Remove what ``find_leftovers`` found, unless a process has it after all.

    Returns:
        The target, if the leftover held its only copy, which is now back in its place.

    Raises:
        OSError: Something in it cannot be removed.
    """
    lock = _take_over(path)
    if lock is None:
        raise BlockingIOError(errno.EBUSY, "A process is writing in it", str(path))
    try:
        restored = _target_of(path) if _holds_the_only_copy(path) else None
        if not _remove(path):
            raise OSError(errno.EACCES, "Cannot be removed completely", str(path))
        return restored
    finally:
        os.close(lock)


def _target_of(path: Path) -> Path:
    match = _NAME.fullmatch(path.name)
    assert match is not None, f"{path} is no scratch directory"
    return path.with_name(match["target"])


def _holds_the_only_copy(path: Path) -> bool:
    """Whether its process was killed between the two renames of a file system without exchange."""
    return (path / _OLD).exists() and not os.path.lexists(_target_of(path))


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Whether a directory is one of this user's, and holds nothing that ``Scratch`` never makes."""
    if not entry.is_dir(follow_symlinks=False):
        return False
    try:
        owner = entry.stat(follow_symlinks=False).st_uid
        names = set(os.listdir(entry.path))
    except OSError:  # not readable, or gone meanwhile
        return False
    # The lock is made first and removed last.
    return owner == os.geteuid() and (not names or {_LOCK} <= names <= {_LOCK, _NEW, _OLD})


def _take_over(path: Path) -> int | None:
    """Lock a scratch directory; None if its process lives, or if that cannot be known."""
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


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS  # then it is never taken for a leftover either
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still what a path leads to."""
    return os.path.samestat(os.fstat(file), os.stat(path))


def _remove(folder: Path) -> bool:
    """Remove a scratch directory, its lock last; whether nothing of it is left.

    What was the target goes back first, if there is no target.
    """
    if _holds_the_only_copy(folder):
        _quietly(lambda: os.rename(folder / _OLD, _target_of(folder)))
        if _holds_the_only_copy(folder):
            return False
        _quietly(lambda: sync_directory(folder.parent))
    for part in (folder / _NEW, folder / _OLD):
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
    except OSError:  # who asks looks at what is left
        pass
