"""Leftovers of killed runs are named, distinguished from live files, and removed; no others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from yopo.support import scratch
from yopo.support.durable import exchange, uninterrupted
from yopo.support.scratch import Scratch, find_leftovers, remove_leftover, report_leftovers

KILLED = """
import os, signal, sys
from pathlib import Path
from yopo.support.scratch import Scratch
with Scratch(Path(sys.argv[1])) as made:
    made.new.mkdir()
    (made.new / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_in(target: Path) -> Path:
    """Kill a real process that holds a target's scratch directory; returns the directory."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)])
    assert done.returncode == -signal.SIGKILL
    (path,) = target.parent.glob(f".{target.name}.yopo-*")
    return path


def test_leftovers_of_a_killed_process_are_found_named_and_removed(tmp_path: Path, capsys) -> None:
    left = kill_in(tmp_path / "out")
    assert find_leftovers(tmp_path) == find_leftovers(tmp_path, "out") == [left]
    assert find_leftovers(tmp_path, "other") == []
    report_leftovers(tmp_path / "out")
    assert str(left) in (said := capsys.readouterr().err) and "--clean" in said
    assert remove_leftover(left) is None and names(tmp_path) == []


def test_files_of_a_living_process_are_left_alone(tmp_path: Path) -> None:
    with Scratch(tmp_path / "out") as made:
        made.new.mkdir()
        (folder,) = tmp_path.iterdir()
        assert find_leftovers(tmp_path) == []
        with pytest.raises(BlockingIOError):
            remove_leftover(folder)
        assert made.new.is_dir()
    assert names(tmp_path) == []


@pytest.mark.parametrize("how", ["other name", "no lock", "another file", "a link", "a file"])
def test_files_that_yopo_did_not_make_are_not_leftovers(tmp_path: Path, how: str) -> None:
    folder = tmp_path / (".out.new-12345678" if how == "other name" else ".out.yopo-12345678")
    if how == "a link":
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "lock").touch()
        folder.symlink_to("photos")
    elif how == "a file":
        folder.touch()
    else:
        (folder / "new").mkdir(parents=True)
        if how != "no lock":
            (folder / "lock").touch()
        if how == "another file":
            (folder / "holiday.jpg").touch()
    before = names(tmp_path)
    assert find_leftovers(tmp_path) == [] and names(tmp_path) == before


def test_a_run_killed_before_locking_leaves_a_leftover(tmp_path: Path) -> None:
    (tmp_path / ".out.yopo-12345678").mkdir()
    (found,) = find_leftovers(tmp_path)
    remove_leftover(found)
    assert names(tmp_path) == []


def test_a_run_survives_losing_its_directory_before_locking(tmp_path: Path, monkeypatch) -> None:
    """A run that loses its directory before locking it makes another one."""
    lock, taken = scratch.try_lock, []

    def late(file: int) -> bool:
        if not taken:
            taken.extend(find_leftovers(tmp_path))
            remove_leftover(taken[0])
        return lock(file)

    monkeypatch.setattr(scratch, "try_lock", late)
    with Scratch(tmp_path / "out") as made:
        made.new.mkdir()
        (folder,) = tmp_path.iterdir()
        assert folder not in taken and find_leftovers(tmp_path) == []
    assert names(tmp_path) == []


def test_the_only_copy_of_a_previous_result_is_restored(tmp_path: Path) -> None:
    """The run was killed between two renames, on a file system that cannot exchange names."""
    left = kill_in(tmp_path / "out")
    (left / "old").mkdir()
    (left / "old" / "config.json").write_text("old")
    assert remove_leftover(left) == tmp_path / "out"
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["config.json"]


def test_a_previous_result_that_cannot_be_restored_is_kept(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    monkeypatch.setattr(scratch, "exchange", lambda one, other: False)
    rename = os.rename

    def fail(old: Path, new: Path) -> None:
        if new == tmp_path / "out":
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError), Scratch(tmp_path / "out") as made:
        made.new.mkdir()
        made.place_directory(check=lambda: True)
    assert "cannot be removed completely" in capsys.readouterr().err
    (left,) = find_leftovers(tmp_path)
    monkeypatch.undo()
    assert remove_leftover(left) == tmp_path / "out"
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_scratch_directory_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    with monkeypatch.context() as patch, Scratch(tmp_path / "out") as made:
        made.new.mkdir()
        patch.setattr(shutil, "rmtree", lambda path, **_: None)
        made.__exit__(None, None, None)
    (left,) = tmp_path.iterdir()
    assert f"{left}: cannot be removed completely" in capsys.readouterr().err
    remove_leftover(left)  # it is still known as one
    assert names(tmp_path) == []


def test_exchange_swaps_two_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


def test_signals_wait_for_the_end_of_a_block_even_if_it_fails() -> None:
    steps = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: steps.append("arrived"))
    try:
        with pytest.raises(ValueError), uninterrupted(), uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            steps.append("done")
            raise ValueError
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert steps == ["done", "arrived", "arrived"]
