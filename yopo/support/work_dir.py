"""Finished stages of long work in a directory, so that a killed command goes on where it was.

A stage is one file: it is written aside, synced and renamed, so it is either whole or absent. The
file ``work.json`` says whose work it is; another command's is refused. A stage has a seal, a digest
of that work, its name and what it holds, so one that was damaged or put there is never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from yopo.support.errors import OutputError, printable
from yopo.support.files import write_file
from yopo.support.scratch import find_leftovers, remove_leftover, try_lock

FORMAT = 2
_HEAD, _LOCK, _ENDING = "work.json", "lock", ".safetensors"

PATIENCE = 1.0
"""Seconds that a directory is waited for: whoever asks for its status holds it for a moment."""


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        tensors: Its tensors by name, on the CPU.
        about: Plain values.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


class Work(Protocol):
    """A place for finished stages."""

    @property
    def own(self) -> Work:
        """A place for those that only this process has, of several that share the work."""

    def load(self, name: str) -> Stage | None:
        """A finished stage, or None."""

    def save(self, name: str, stage: Stage) -> None:
        """Keep a stage; replaces one of the same name."""

    def drop(self, name: str) -> None:
        """Forget a stage, if there is one."""

    def close(self) -> None:
        """Let other processes work in this place."""


class NoWork:
    """Keeps nothing."""

    @property
    def own(self) -> Work:
        """Itself."""
        return self

    def load(self, name: str) -> Stage | None:
        """None."""
        return None

    def save(self, name: str, stage: Stage) -> None:
        """Do nothing."""

    def drop(self, name: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class WorkDir:
    """Stages in a directory.

    Args:
        path: The directory.
        lock: Descriptor of its locked file (see :func:`open_work`); None: only to look at.
    """

    def __init__(self, path: Path, lock: int | None = None):
        self.path, self._lock = path, lock

    @property
    def own(self) -> Work:
        """Itself."""
        return self

    def close(self) -> None:
        """Let other processes work in the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load(self, name: str) -> Stage | None:
        """A finished stage, or None.

        Raises:
            OutputError: Its file is damaged.
        """
        path = self.file(name)
        try:
            with _reading(path) as file:
                kept = json.loads(file.metadata()["yopo"])
                stage = Stage({key: file.get_tensor(key) for key in file.keys()}, kept["about"])
        except FileNotFoundError:
            return None
        if kept.get("seal") != self._seal(name, stage):
            raise _damaged(path, "its contents are not what this work kept")
        return stage

    def save(self, name: str, stage: Stage) -> None:
        """Keep a stage; replaces one of the same name.

        Raises:
            OutputError: It cannot be written.
        """
        tensors = {key: each.detach().cpu().contiguous() for key, each in stage.tensors.items()}
        seal = self._seal(name, Stage(tensors, stage.about))
        # A single entry, as several are written in random order.
        about = json.dumps({"about": stage.about, "seal": seal})
        write_file(self.file(name), save(tensors, metadata={"yopo": about}))

    def drop(self, name: str) -> None:
        """Forget a stage, if there is one."""
        self.file(name).unlink(missing_ok=True)

    def about(self, prefix: str) -> list[dict[str, Any]]:
        """The plain values of finished stages whose names begin with a prefix, in their order;
        a full name ends in a dot."""
        found = []
        for path in sorted(self.path.glob(f"{prefix}*{_ENDING[1:]}")):
            with suppress(FileNotFoundError):  # dropped meanwhile
                found.append(self._about(path))
        return found

    def count(self, prefix: str) -> int:
        """Number of files of finished stages whose names begin with a prefix; a full name ends in
        a dot."""
        return sum(1 for _ in self.path.glob(f"{prefix}*{_ENDING[1:]}"))

    @property
    def is_in_use(self) -> bool:
        """Whether a process is working in the directory."""
        try:
            lock = os.open(self.path / _LOCK, os.O_RDONLY)
        except OSError:
            return False
        try:
            return not try_lock(lock, is_shared=True)
        finally:
            os.close(lock)

    @property
    def is_begun(self) -> bool:
        """Whether the directory holds work of some version."""
        return (self.path / _HEAD).exists()

    def key(self) -> dict[str, Any]:
        """What the work is: model, data and options.

        Raises:
            OutputError: The directory holds no work of this version.
        """
        if not self.is_begun:
            raise OutputError(
                f"{self.path}: holds no work of yopo.",
                remedy="Name the directory of a `yopo calibrate --work-dir`.",
            )
        path = self.path / _HEAD
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["yopo_work"] == FORMAT and isinstance(found["key"], dict):
                return found["key"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise OutputError(
            f"{path}: is damaged, or of another version of yopo.",
            remedy="Name another directory, or remove this one: its work cannot go on.",
        )

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.key(), sort_keys=True).encode()).hexdigest()

    def _seal(self, name: str, stage: Stage) -> str:
        """Digest of a stage, of its name and of whose work it is; its tensors are on the CPU."""
        head = json.dumps([self._digest, name, stage.about], sort_keys=True)
        state = hashlib.sha256(head.encode())
        for key, tensor in sorted(stage.tensors.items()):
            state.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()

    @staticmethod
    def _about(path: Path) -> dict[str, Any]:
        with _reading(path) as file:
            return json.loads(file.metadata()["yopo"])["about"]

    def file(self, name: str) -> Path:
        """Where a stage is, or will be."""
        return self.path / f"{name}{_ENDING}"


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, type(error).__name__) from error


def _damaged(path: Path, problem: str) -> OutputError:
    return OutputError(
        f"{path}: is damaged ({problem}).",
        remedy="Remove this file; the same command then makes it again.",
    )


def open_work(path: Path, key: Mapping[str, Any]) -> WorkDir:
    """Open a directory for the work that ``key`` describes; create it if it is missing.

    Args:
        path: The directory.
        key: Plain values that the results depend on.

    Returns:
        The directory, locked until it is closed or the process ends, however it ends.

    Raises:
        OutputError: It holds other work, or other files; a process is working in it; or it cannot
            be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = {each.name for each in path.iterdir()}
        if _HEAD not in names and any(name != _LOCK and name[0] != "." for name in names):
            raise OutputError(
                f"{path}: holds other files, expected an empty directory or work of yopo.",
                remedy="Name another directory.",
            )
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from error
    work = WorkDir(path, lock)
    try:
        if not _lock_soon(lock):
            raise OutputError(
                f"{path}: another process is working in it.",
                remedy="Wait for it, or name another directory.",
            )
        _clean(path)
        if work.is_begun:  # perhaps by a process that had the lock just now
            _check_same(path, work.key(), json.loads(json.dumps(dict(key))))
        else:
            head = json.dumps({"yopo_work": FORMAT, "key": dict(key)}, indent=1)
            write_file(path / _HEAD, head.encode())
    except BaseException:
        work.close()
        raise
    return work


def _lock_soon(lock: int) -> bool:
    """Lock an open file for this process; false if another keeps it."""
    until = time.monotonic() + PATIENCE
    while not try_lock(lock):
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def _check_same(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            there, here = (_short(each.get(name)) for each in (found, expected))
            raise OutputError(
                f"{path}: holds the work of another command: its {name} is {there}, not {here}.",
                remedy="Repeat that command, or name another directory.",
            )


def _short(value: object) -> str:
    text = printable(str(value))
    return text if len(text) <= 200 else f"{text[:197]}..."


def _clean(path: Path) -> None:
    """Remove what killed runs were writing."""
    for leftover in find_leftovers(path):
        with suppress(OSError):
            remove_leftover(leftover)
