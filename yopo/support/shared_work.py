"""A work directory of several processes that share a calibration, on a file system of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from yopo.support.ranks import leads, of_first_object
from yopo.support.work_dir import Stage, WorkDir


class SharedWork:
    """Stages that all processes have: the first one reads and writes them.

    All must ask for the same stages in the same order. As what the first finds is what all get,
    none can find a stage that another has not seen, and go another way.

    Args:
        path: The directory.
        open_first: Opens it; called in the first process.

    Attributes:
        own: Stages of which each process has others.

    Raises:
        OutputError: The directory cannot be used, in the first process.
    """

    def __init__(self, path: Path, open_first: Callable[[], WorkDir]):
        self._first = open_first() if leads() else None
        of_first_object(None)  # the others begin when leftovers are removed
        self.own = WorkDir(path)

    def load(self, name: str) -> Stage | None:
        """A finished stage, or None; errors as for ``WorkDir``."""
        return of_first_object(None if self._first is None else self._first.load(name))

    def save(self, name: str, stage: Stage) -> None:
        """Keep a stage."""
        if self._first is not None:
            self._first.save(name, stage)

    def drop(self, name: str) -> None:
        """Forget a stage, if there is one."""
        if self._first is not None:
            self._first.drop(name)

    def close(self) -> None:
        """Let other commands work in the directory."""
        if self._first is not None:
            self._first.close()
