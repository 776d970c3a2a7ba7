"""What a power cut, a full disk or another command can do to a work directory: never wrong bytes,
never a traceback."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch

from yopo.cli.main import main
from yopo.fitting.states import InFiles
from yopo.support import work_dir
from yopo.support.errors import OutputError
from yopo.support.work_dir import Stage, WorkDir, open_work

FEW = (
    *("--model", "llava-tiny", "--samples", 32, "--batch-size", 4, "--max-new-tokens", 2),
    *("--measure-pairs", 8, "--fit-pairs", 8, "--budget", 0.3, "--compensation", "refit"),
)
Calibrate = Callable[..., tuple[int, str]]


def make_few(patch: pytest.MonkeyPatch) -> None:
    """One allocation, and sums kept after every batch."""
    tiny.try_few_plans(patch)
    patch.setattr("yopo.calibration.measure.PERIOD", 0.0)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    make_few(monkeypatch)


@pytest.fixture
def calibrate(capsys: pytest.CaptureFixture[str]) -> Iterator[Calibrate]:
    """Calibrates in a folder; returns the exit code and what was said."""

    def run(folder: Path, *options: object) -> tuple[int, str]:
        work, plan = folder / "work", folder / "plan.yaml"
        line = ("calibrate", *FEW, "--work-dir", work, "-o", plan, "--force", "-q", *options)
        code = main([str(each) for each in line])
        return code, capsys.readouterr().err

    yield run


def plan_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("plan*")}


def assert_sentence(found: tuple[int, str], words: str) -> None:
    code, said = found
    assert code == 1 and said.count("error: ") == 1 and words in said, said
    assert "unexpected" not in said and "Traceback" not in said, said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a calibration that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    line = ("calibrate", *FEW, "--work-dir", folder / "work", "-o", folder / "plan.yaml", "-q")
    with pytest.MonkeyPatch.context() as patch:
        make_few(patch)
        assert main([str(each) for each in line]) == 0
    return folder


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def zeroed(path: Path) -> None:
    """The end of a file never reached the disk, though its size did."""
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes(8))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swapped(path: Path) -> None:
    """Another stage of the same work."""
    other = next(each for each in path.parent.glob("*.safetensors") if each != path)
    shutil.copy(other, path)


DAMAGES = (emptied, cut, zeroed, flipped, swapped)


# A stage


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_a_file_is_told(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    work = open_work(tmp_path, {})
    for name in ("one", "two"):
        work.save(name, Stage({"x": torch.arange(1, 4)}, {"y": [name]}))
    damage(work.file("one"))
    with pytest.raises(OutputError, match="one.safetensors: is damaged"):
        work.load("one")
    assert work.load("two") is not None


def test_a_stage_of_other_work_is_told(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        work = open_work(tmp_path / name, {"model": name})
        work.save("one", Stage({"x": torch.arange(3)}))
    shutil.copy(tmp_path / "mine" / "one.safetensors", tmp_path / "other")
    with pytest.raises(OutputError, match="is damaged .its contents are not what this work kept"):
        work.load("one")


# A calibration


@pytest.mark.parametrize(
    ("stage", "damage"),
    [
        ("totals", emptied),
        ("statistics", flipped),
        ("statistics", swapped),
        ("profile", cut),
        ("answers-*", zeroed),
        ("comparison-*", flipped),
    ],
)
def test_a_damaged_stage_is_named_and_made_again(
    calibrate: Calibrate,
    finished: Path,
    tmp_path: Path,
    stage: str,
    damage: Callable[[Path], None],
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    damaged = sorted((tmp_path / "work").glob(f"{stage}.safetensors"))[0]
    damage(damaged)
    if stage != "totals":  # which every run writes, and only --status reads
        assert_sentence(calibrate(tmp_path), f"{damaged}: is damaged (")
        damaged.unlink()
    assert calibrate(tmp_path)[0] == 0
    assert plan_of(tmp_path) == plan_of(finished)


def test_damaged_layers_are_named_where_they_are_needed(
    calibrate: Calibrate, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    work = tmp_path / "work"
    for lost in (*work.glob("comparison-*"), work / "profile.safetensors"):
        lost.unlink()
    for damaged in (work / "profile-003.safetensors", sorted(work.glob("layer-*"))[2]):
        emptied(damaged)
        assert_sentence(calibrate(tmp_path), f"{damaged}: is damaged (")
        damaged.unlink()
    assert calibrate(tmp_path)[0] == 0
    assert plan_of(tmp_path) == plan_of(finished)


@pytest.mark.parametrize("damage", [emptied, cut])
def test_without_its_head_work_cannot_go_on(
    calibrate: Calibrate, finished: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "work" / "work.json")
    assert_sentence(calibrate(tmp_path), "work.json: is damaged, or of another version")
    assert_sentence(calibrate(tmp_path, "--status", tmp_path / "work"), "work.json: is damaged")


# A full disk


@pytest.mark.parametrize("room", [0, 2, 9, 20])
def test_a_full_disk_is_told_and_work_goes_on_when_it_is_not(
    calibrate: Calibrate, finished: Path, tmp_path: Path, room: int
) -> None:
    """After ``room`` files that could be written."""
    left = room
    fsync = os.fsync

    def full(file: int) -> None:
        nonlocal left
        if not os.path.isdir(f"/proc/self/fd/{file}"):
            left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yopo.support.durable.os.fsync", full)
        assert_sentence(calibrate(tmp_path), "No space left on device")
    assert not plan_of(tmp_path)
    assert not [each for each in (tmp_path / "work").iterdir() if each.name.startswith(".")]
    assert calibrate(tmp_path)[0] == 0
    assert plan_of(tmp_path) == plan_of(finished)


def test_a_full_disk_is_told_before_states_are_written(
    calibrate: Calibrate, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a mapped file on a full disk would end the process by SIGBUS."""
    with monkeypatch.context() as patch:

        def full(file: int, offset: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError, match="no room for the states of the pairs: No space"):
            InFiles(tmp_path).put(torch.ones(3))
        assert_sentence(calibrate(tmp_path, "--offload", "always"), "work: no room for the states")
    assert calibrate(tmp_path, "--offload", "always")[0] == 0
    assert plan_of(tmp_path) == plan_of(finished)


# Other commands


def test_whoever_asks_for_the_status_is_in_nobodys_way(tmp_path: Path) -> None:
    open_work(tmp_path, {}).close()
    ended, seen = threading.Event(), []

    def ask() -> None:
        while not ended.is_set():
            seen.append(WorkDir(tmp_path).is_in_use)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        time.sleep(0.2)
        assert not any(seen), "those who ask take one another for work in progress"
        for _ in range(50):
            open_work(tmp_path, {}).close()
    finally:
        ended.set()
        for thread in asking:
            thread.join()


def test_a_directory_that_another_command_took_first_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command begins, and ends, while this one waits for the lock of an empty directory."""
    lock = work_dir.try_lock

    def late(file: int) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(work_dir, "try_lock", lock)
            other = open_work(tmp_path, {"model": "another"})
        other.save("one", Stage({"x": torch.arange(3)}))
        other.close()
        return lock(file)

    monkeypatch.setattr(work_dir, "try_lock", late)
    with pytest.raises(OutputError, match="its model is another, not mine"):
        open_work(tmp_path, {"model": "mine"})
