"""Memory that control groups leave: the limits of containers and of batch systems.

A process in a group that takes more than its limit is killed without a word, however much memory
the machine has; one over ``memory.high`` is slowed down until it hardly moves. Groups are nested,
and each limit holds for all that is inside.

File caches, active ones as well, count as free: they are dropped before anything is killed, as they
are outside of groups, where ``MemAvailable`` counts both. (kubelet and docker count active ones as
taken; there, weights and states that were read twice from their files would look like a lack of
memory.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT = 1 << 60
"""Bytes of the first version's files that mean none."""


@dataclass(frozen=True)
class _Version:
    """Names of a group's files.

    Attributes:
        limits: Bytes that it may take.
        used: Bytes that it takes.
        caches: The lines of ``memory.stat`` that have those of file caches.
    """

    limits: tuple[str, ...]
    used: str
    caches: tuple[str, ...]


_VERSIONS = {
    "cgroup": _Version(
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
    "cgroup2": _Version(
        ("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")
    ),
}
"""By type of file system."""


def free_in_groups(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take under the limits of its groups.

    Args:
        root: Where ``proc`` and all mounts are.

    Returns:
        The least of all groups around it; None if none has a limit that can be read.
    """
    try:
        found = [_free(group, version) for group, version in _groups(root)]
    except (ValueError, IndexError):  # what only resembles the kernel's files
        return None
    return min((each for each in found if each is not None), default=None)


def _free(group: Path, version: _Version) -> int | None:
    limits = (_number(group / name) for name in version.limits)
    limit = min((each for each in limits if each is not None), default=_NO_LIMIT)
    used = _number(group / version.used)
    if used is None or limit >= _NO_LIMIT:
        return None
    lines = map(str.split, _lines(group / "memory.stat"))
    caches = sum(int(line[1]) for line in lines if line and line[0] in version.caches)
    return max(0, limit - used + caches)


def _groups(root: Path) -> Iterator[tuple[Path, _Version]]:
    """Directories of this process's group and of those around it, as far as they are mounted."""
    paths = _paths(root)
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, source = (part.split() for part in line.partition(" - "))
        kind, options = source[0], source[-1].split(",")
        if kind not in paths or (kind == "cgroup" and "memory" not in options):
            continue
        top = root / mount[4].lstrip("/")
        group = _group(top, PurePosixPath(mount[3]), paths[kind])
        for each in (group, *group.parents):
            if each.is_relative_to(top):
                yield each, _VERSIONS[kind]


def _group(top: Path, mounted: PurePosixPath, path: PurePosixPath) -> Path:
    """The directory of a group, given which path is mounted where.

    A container that sees its host's paths has nothing there but its own group, which is mounted.
    """
    found = top / path.relative_to(mounted) if path.is_relative_to(mounted) else top
    return found if found.is_dir() else top


def _paths(root: Path) -> dict[str, PurePosixPath]:
    """The paths of this process's groups that count memory, by type of file system."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            found["cgroup2"] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            found["cgroup"] = PurePosixPath(path)
    return found


def _lines(file: Path) -> list[str]:
    """A file's lines; none where it cannot be read."""
    with suppress(OSError):
        return file.read_text("utf-8", errors="surrogateescape").splitlines()
    return []


def _number(file: Path) -> int | None:
    """The number that a file holds; None if it holds ``max``, or cannot be read."""
    text = "".join(_lines(file))
    return int(text) if text.isdecimal() else None
