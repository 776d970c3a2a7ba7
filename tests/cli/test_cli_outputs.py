"""Commands never overwrite unrelated files, keep statistics after a failure, clean leftovers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import DRAWINGS, FAST, Yopo

from yopo.calibration.statistics_file import load_statistics
from yopo.cli.main import main
from yopo.support.durable import exchange
from yopo.support.errors import PlanError
from yopo.support.scratch import find_leftovers

QUICK = (*FAST, *DRAWINGS, "--preset", "yopo-25")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "outputs",
    [
        ("-o", "model.yaml"),
        ("-o", "model.safetensors"),
        ("-o", "config.json"),
        ("--stats", "model.safetensors", "-o", "../plan.yaml"),
        ("--stats", "config.json", "-o", "../plan.yaml"),
    ],
)
def test_force_never_overwrites_the_model(
    yopo: Yopo, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: tuple
) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    monkeypatch.chdir(copy)
    before = contents(copy)
    done = yopo("calibrate", "--model", ".", *QUICK, *outputs, "--force")
    assert done.is_sentence and contents(copy) == before
    assert not (tmp_path / "plan.yaml").exists()


def test_force_never_overwrites_an_input(
    yopo: Yopo, model: Path, pairs: Path, calibrated: Path, tmp_path: Path
) -> None:
    work = shutil.copytree(pairs.parent, tmp_path / "inputs")
    (work / "config.yaml").write_text("budget: 0.25\n")
    shutil.copy(calibrated / "stats.safetensors", work)
    shutil.copy(calibrated / "plan.yaml", work)
    before = contents(work)
    data, stats, plan = work / "pairs.jsonl", work / "stats.safetensors", work / "plan.yaml"
    calibrate = ("calibrate", "--model", model, "--data", data, *FAST, "--force")
    for command in (
        (*calibrate, "-o", data),
        (*calibrate, "--stats", data),
        (*calibrate, "--config", work / "config.yaml", "-o", work / "config.yaml"),
        ("plan", stats, "-o", stats, "--force"),
        ("inspect", plan, "--html", plan, "--force"),
    ):
        assert yopo(*command).is_sentence, command
    assert contents(work) == before


def test_devices_pipes_and_links_are_refused(yopo: Yopo, model: Path, calibrated: Path) -> None:
    os.mkfifo("pipe")
    Path("link").symlink_to(calibrated / "plan.yaml")
    for output in ("pipe", "link", "/dev/zero"):
        for command in (
            ("calibrate", "--model", model, *QUICK, "-o", output),
            ("calibrate", "--model", model, *QUICK, "--stats", output),
            ("inspect", calibrated / "plan.yaml", "--html", output),
        ):
            assert yopo(*command, "--force").is_sentence, command
    assert sorted(os.listdir()) == ["link", "pipe"]


def test_an_html_page_may_replace_an_html_page(yopo: Yopo, calibrated: Path) -> None:
    for force in ((), ("--force",)):
        done = yopo("inspect", calibrated / "plan.yaml", "--html", "page.html", *force)
        assert done.code == 0, done.err
    assert os.listdir() == ["page.html"]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("error", [PlanError("No.", remedy="Think."), RuntimeError("a bug")])
def test_a_plan_that_fails_does_not_lose_the_statistics(
    yopo: Yopo, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked, error
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("yopo.pipeline.session.CalibrationSession.make", fail)
    stats = ("--stats", "s.safetensors") if asked else ()
    done = yopo("calibrate", "--model", model, *QUICK, *stats)
    (path,) = [Path("s.safetensors")] if asked else (tmp_path / "cache").glob("statistics-*")
    assert done.code == 1 and f"`yopo plan {path}` makes plans from them" in done.err
    assert isinstance(error, RuntimeError) or done.is_sentence
    assert len(load_statistics(path).rho) == 32
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "work")
    assert yopo("plan", path, "--preset", "yopo-25", "-o", "again.yaml").code == 0


_STEPS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "open", "ctypes.dlsym"}


def run_killed(limit: int | None, *arguments: object) -> int:
    """Run a command line in a process that kills itself before a step on an unfinished result.

    Args:
        limit: Number of the step, from 1; None: never.
        arguments: The command line.

    Returns:
        The number of steps.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def watch(event: str, about: tuple) -> None:
            nonlocal steps
            names = [str(each) for each in about[:2]] if event in _STEPS else []
            if any(".yopo-" in name or name == "renameat2" for name in names):
                steps += 1
                os.write(write, b".")
                if steps == limit:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)  # only of this process, which ends here
        try:
            os._exit(main([str(each) for each in arguments]))
        finally:
            os._exit(99)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        steps = len(told.read())
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == (0 if limit is None else -signal.SIGKILL), code
    return steps


@pytest.mark.parametrize("replaces", ["by exchange", "by two renames", "nothing"])
def test_a_kill_before_any_step_leaves_a_complete_checkpoint(
    yopo: Yopo, plan: Path, model: Path, monkeypatch: pytest.MonkeyPatch, replaces: str
) -> None:
    """With --force it is the old or the new one; anything else that is left can be cleaned.

    On file systems that need two renames there is none in between: cleaning restores it.
    """
    if replaces == "by exchange":
        Path("a").touch()
        Path("b").touch()
        if not exchange(Path("a"), Path("b")):
            pytest.skip("this file system cannot exchange two names")
        Path("a").unlink()
        Path("b").unlink()
    else:
        monkeypatch.setattr("yopo.support.scratch.exchange", lambda one, other: False)
    apply = ("apply", plan, "--model", model, "-o", "out", "--force")
    total = run_killed(None, *apply)
    whole = contents(Path("out"))
    assert total > 20 and len(whole) > 8
    num_left = 0
    for limit in range(1, total + 1):
        if replaces == "nothing":
            shutil.rmtree("out", ignore_errors=True)
        run_killed(limit, *apply)
        if replaces == "by exchange" or Path("out").exists():
            assert contents(Path("out")) == whole, limit
        left = find_leftovers(Path.cwd())
        assert {path.name for path in left} == {*os.listdir()} - {"out"}
        num_left += len(left)
        assert yopo("apply", "--clean", ".").code == 0
        assert set(os.listdir()) <= {"out"}
        if replaces != "nothing":
            assert contents(Path("out")) == whole, limit
    assert num_left == total - 1  # before the first step there is nothing


def test_leftovers_are_named_and_then_cleaned(yopo: Yopo, plan: Path, model: Path) -> None:
    run_killed(12, "apply", plan, "--model", model, "-o", "out")
    (left,) = os.listdir()
    done = yopo("apply", plan, "--model", model, "-o", "out", "--dry-run")
    assert "left by a run" not in done.err  # the same run goes on with it
    Path(left, "key").write_text("of another plan")
    done = yopo("apply", plan, "--model", model, "-o", "out", "--dry-run")
    assert done.err.count("left by a run that was killed") == 1 and left in done.err
    assert "yopo apply --clean" in done.err
    done = yopo("apply", "--clean", "out")
    assert done.code == 0 and done.out.strip().endswith(left) and os.listdir() == []
    done = yopo("apply", "--clean", "out")
    assert (done.code, done.out, done.err) == (0, "", "Nothing to remove.\n")


def test_clean_excludes_a_plan_and_needs_an_existing_folder(yopo: Yopo, plan: Path) -> None:
    assert yopo("apply", plan, "--clean", ".").code == 2
    assert yopo("apply").code == 2
    done = yopo("apply", "--clean", "nowhere/out")
    assert done.is_sentence and "its folder does not exist" in done.err


def test_a_finished_apply_survives_a_power_cut(
    yopo: Yopo, plan: Path, model: Path, tmp_path: Path
) -> None:
    """A copy of the disk shows that all files have reached it, complete, when `apply` returns."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4, to mount a file system of its own")
    image, copy, point = tmp_path / "disk", tmp_path / "after", tmp_path / "mounted"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, point], capture_output=True).returncode:
        pytest.skip("no loop device can be mounted here")
    try:
        assert yopo("apply", plan, "--model", model, "-o", point / "out").code == 0
        whole = contents(point / "out")
        (point / "not-synced").write_bytes(b"x" * 10000)  # this would be lost
        shutil.copyfile(image, copy)
    finally:
        subprocess.run(["umount", point], check=True)
    subprocess.run(["mount", "-o", "loop", copy, point], check=True)
    try:
        found = contents(point / "out")
        lost = point / "not-synced"
        assert not lost.exists() or not lost.read_bytes()  # the copy was taken at the right moment
    finally:
        subprocess.run(["umount", point], check=True)
    assert found == whole and len(whole) > 8
