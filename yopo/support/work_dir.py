"""Finished stages of long work in a directory, so that a killed command goes on where it was.

A stage is one file: it is written aside, synced and renamed, so it is either whole or absent. The
file ``work.json`` says whose work it is; another command's is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from yopo.support.errors import OutputError, printable
from yopo.support.files import write_file
from yopo.support.scratch import find_leftovers, remove_leftover, try_lock

FORMAT = 1
_HEAD, _LOCK, _ENDING = "work.json", "lock", ".safetensors"


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

    def save_bytes(self, name: str, data: bytes) -> None:
        """Keep a stage that has its own form of safetensors."""

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

    def save_bytes(self, name: str, data: bytes) -> None:
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
                about = json.loads((file.metadata() or {})["yopo"])
                return Stage({key: file.get_tensor(key) for key in file.keys()}, about)
        except FileNotFoundError:
            return None

    def save(self, name: str, stage: Stage) -> None:
        """Keep a stage; replaces one of the same name.

        Raises:
            OutputError: It cannot be written.
        """
        tensors = {key: each.detach().cpu().contiguous() for key, each in stage.tensors.items()}
        # A single entry, as several are written in random order.
        self.save_bytes(name, save(tensors, metadata={"yopo": json.dumps(stage.about)}))

    def save_bytes(self, name: str, data: bytes) -> None:
        """Keep a stage that has its own form of safetensors; errors as for :meth:`save`."""
        write_file(self.file(name), data)

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
            lock = os.open(self.path / _LOCK, os.O_RDWR)
        except OSError:
            return False
        try:
            return not try_lock(lock)
        finally:
            os.close(lock)

    def key(self) -> dict[str, Any]:
        """What the work is: model, data and options.

        Raises:
            OutputError: The directory holds no work of this version.
        """
        try:
            found = json.loads((self.path / _HEAD).read_text(encoding="utf-8"))
            if found["yopo_work"] == FORMAT and isinstance(found["key"], dict):
                return found["key"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise OutputError(
            f"{self.path}: holds no work of this version of yopo.",
            remedy="Name the directory of a `yopo calibrate --work-dir`.",
        )

    @staticmethod
    def _about(path: Path) -> dict[str, Any]:
        with _reading(path) as file:
            return json.loads((file.metadata() or {})["yopo"])

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
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise OutputError(
            f"{path}: is damaged ({type(error).__name__}).",
            remedy="Remove this file; the same command then makes it again.",
        ) from error


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
        is_new = not (path / _HEAD).exists()
        if is_new and any(each.name != _LOCK and each.name[0] != "." for each in path.iterdir()):
            raise OutputError(
                f"{path}: holds other files, expected an empty directory or work of yopo.",
                remedy="Name another directory.",
            )
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from error
    work = WorkDir(path, lock)
    try:
        if not try_lock(lock):
            raise OutputError(
                f"{path}: another process is working in it.",
                remedy="Wait for it, or name another directory.",
            )
        _clean(path)
        if is_new:
            head = json.dumps({"yopo_work": FORMAT, "key": dict(key)}, indent=1)
            write_file(path / _HEAD, head.encode())
        else:
            _check_same(path, work.key(), json.loads(json.dumps(dict(key))))
    except BaseException:
        work.close()
        raise
    return work


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
