"""Limits of control groups, in trees of files like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from yopo.support import memory
from yopo.support.cgroups import free_in_groups

V2 = "30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
OTHERS = """22 1 0:20 / / rw - overlay overlay rw,lowerdir=/a:/b
34 31 0:31 / /sys/fs/cgroup/cpuset rw shared:9 - cgroup cgroup rw,cpuset"""
UNLIMITED = "9223372036854771712"


def tree(root: Path, path: str, mounted: str = "/", *, first: bool = False) -> Path:
    """A root whose process is in a group; returns the directory of the mounted group."""
    (root / "proc/self").mkdir(parents=True)
    line = f"4:cpuacct,memory:{path}" if first else f"0::{path}"
    (root / "proc/self/cgroup").write_text(f"9:cpuset:/elsewhere\n{line}\n")
    mount = (V1 if first else V2).format(mounted=mounted)
    (root / "proc/self/mountinfo").write_text(f"{OTHERS}\n{mount}\n")
    top = root / ("sys/fs/cgroup/memory" if first else "sys/fs/cgroup")
    top.mkdir(parents=True)
    return top


def second_version(folder: Path, most: object, used: int, active: int = 0, idle: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    stat = f"anon 7\nfile 99\nactive_file {active}\ninactive_file {idle}\nslab 5\n"
    (folder / "memory.stat").write_text(stat)


def first_version(folder: Path, most: object, used: int, active: int = 0, idle: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{most}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    own = "active_file 1\ninactive_file 2\n"
    (folder / "memory.stat").write_text(
        f"{own}total_active_file {active}\ntotal_inactive_file {idle}\n"
    )


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    top = tree(tmp_path, "/slurm/job/step")
    second_version(top / "slurm/job/step", "max", 300)
    assert free_in_groups(tmp_path) is None
    second_version(top / "slurm/job", 1000, 400, active=30, idle=100)
    assert free_in_groups(tmp_path) == 730
    second_version(top / "slurm", 5000, 4500)
    assert free_in_groups(tmp_path) == 500
    second_version(top / "slurm/job/step", 350, 300)
    assert free_in_groups(tmp_path) == 50
    second_version(top / "another", 10, 9)
    assert free_in_groups(tmp_path) == 50
    second_version(top / "slurm/job/step", 350, 400)
    assert free_in_groups(tmp_path) == 0


def test_a_group_that_is_slowed_down_has_no_more_either(tmp_path: Path) -> None:
    top = tree(tmp_path, "/")
    second_version(top, 1000, 400)
    (top / "memory.high").write_text("max\n")
    assert free_in_groups(tmp_path) == 600
    (top / "memory.high").write_text("500\n")
    assert free_in_groups(tmp_path) == 100


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("path", "mounted", "place"),
    [
        ("/", "/", ""),  # a namespace of its own
        ("/docker/1f", "/", "docker/1f"),
        ("/docker/1f", "/", ""),  # the host's paths, of which nothing is there
        ("/docker/1f", "/docker/1f", ""),
        ("/docker/1f/part", "/docker/1f", "part"),
        ("/", "/../1f", ""),
    ],
)
def test_groups_are_found_where_they_are_mounted(
    tmp_path: Path, path: str, mounted: str, place: str, first: bool
) -> None:
    top = tree(tmp_path, path, mounted, first=first)
    (first_version if first else second_version)(top / place, 1000, 400, 100, 200)
    assert free_in_groups(tmp_path) == 900


def test_the_first_version_has_its_own_files(tmp_path: Path) -> None:
    top = tree(tmp_path, "/pod/box", first=True)
    first_version(top, UNLIMITED, 9000)
    first_version(top / "pod/box", UNLIMITED, 300)
    assert free_in_groups(tmp_path) is None
    first_version(top / "pod", 2000, 1500, active=200, idle=50)
    assert free_in_groups(tmp_path) == 750
    first_version(top / "pod/box", 500, 300)
    assert free_in_groups(tmp_path) == 200


def test_what_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    assert free_in_groups(tmp_path) is None
    top = tree(tmp_path, "/box")
    second_version(top / "box", 1000, 400, active=100)
    second_version(top, "?", 950)
    assert free_in_groups(tmp_path) == 700
    (top / "box/memory.stat").unlink()
    assert free_in_groups(tmp_path) == 600, "without caches"
    (top / "box/memory.max").unlink()
    (top / "box/memory.max").mkdir()
    assert free_in_groups(tmp_path) is None
    (top / "box/memory.max").rmdir()
    second_version(top / "box", 1000, 400)
    (top / "box/memory.current").unlink()
    assert free_in_groups(tmp_path) is None
    second_version(top / "box", 1000, 400)
    assert free_in_groups(tmp_path) == 600
    (tmp_path / "proc/self/mountinfo").write_text("of another kind\n")
    assert free_in_groups(tmp_path) is None


@pytest.mark.parametrize(
    ("system", "group", "expected", "is_limited"),
    [(10, None, 10, False), (10, 20, 10, False), (20, 10, 10, True), (None, 10, 10, True)],
)
def test_available_memory_is_the_least_of_both(
    monkeypatch: pytest.MonkeyPatch,
    system: int | None,
    group: int | None,
    expected: int,
    is_limited: bool,
) -> None:
    monkeypatch.setattr(memory, "_of_system", lambda: system)
    monkeypatch.setattr(memory, "free_in_groups", lambda: group)
    assert memory.available_bytes() == expected
    assert memory.is_limited() is is_limited
    monkeypatch.setattr(memory, "_of_system", lambda: None)
    monkeypatch.setattr(memory, "free_in_groups", lambda: None)
    assert memory.available_bytes() is None
