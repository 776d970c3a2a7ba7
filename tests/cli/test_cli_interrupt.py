"""Ctrl-C, SIGTERM and SIGHUP may come at any time: real signals to a real process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import DRAWINGS, FAST, Yopo

from yopo.calibration.statistics_file import load_statistics
from yopo.checkpoint import bake
from yopo.cli import interrupts
from yopo.cli.main import main

_DRIVER = """
import importlib, sys, time
from yopo.cli.main import main

module = importlib.import_module(sys.argv[1])
original = getattr(module, sys.argv[2])

def stop_here(*arguments, **options):
    original(*arguments, **options)
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)

setattr(module, sys.argv[2], stop_here)
sys.exit(main(sys.argv[3:]))
"""
"""Runs a command line that pauses at a function's first call."""


def interrupted(
    place: tuple[str, str], arguments: list[object], folder: Path, number: signal.Signals
) -> tuple[int, str, str, list[str]]:
    """Interrupt a command line where it pauses.

    Returns:
        (exit code, stdout, stderr after "ready", the folder's content during the pause).
    """
    with subprocess.Popen(
        [sys.executable, "-c", _DRIVER, *place, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "YOPO_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            for line in process.stderr:
                if line == "ready\n":
                    break
            meanwhile = os.listdir(folder)
            process.send_signal(number)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, out, err, meanwhile


OUTCOMES = {
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
    signal.SIGHUP: (129, "hung up"),
}


@pytest.mark.parametrize("number", OUTCOMES)
def test_an_interrupted_bake_leaves_nothing(
    plan: Path, model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    place = ("yopo.checkpoint.bake", "write_weights")
    found = interrupted(place, ["apply", plan, "--model", model, "-o", "out"], work, number)
    code, out, err, meanwhile = found
    assert (code, err.strip()) == OUTCOMES[number] and out == ""
    assert len(meanwhile) == 1 and meanwhile[0].startswith(".out.yopo-")  # it was in the middle
    assert os.listdir(work) == []


def test_an_interrupted_calibration_leaves_nothing(model: Path, tmp_path: Path) -> None:
    arguments = ["calibrate", "--model", model, *FAST, *DRAWINGS, "--stats", "s.safetensors"]
    place = ("yopo.calibration.measure", "_observe")
    code, out, err, _ = interrupted(place, arguments, tmp_path, signal.SIGINT)
    assert (code, out, err.strip()) == (130, "", "interrupted")
    assert os.listdir(tmp_path) == []


def test_statistics_are_written_before_planning_starts(model: Path, tmp_path: Path) -> None:
    arguments = ["calibrate", "--model", model, *FAST, *DRAWINGS, "--stats", "s.safetensors"]
    place = ("yopo.cli.results", "write_file")
    code, out, err, _ = interrupted(place, arguments, tmp_path, signal.SIGTERM)
    assert (code, out, err.strip()) == (143, "", "terminated")
    assert os.listdir(tmp_path) == ["s.safetensors"]
    assert (
        len(load_statistics(tmp_path / "s.safetensors").rho) == 24
    )  # of 32; the others are held out


def test_an_interrupted_write_of_pairs_leaves_nothing(tmp_path: Path) -> None:
    place = ("yopo.demo.pair_files", "write_pairs")
    arguments = ["pairs", "mine", "--count", 2]
    code, out, err, meanwhile = interrupted(place, arguments, tmp_path, signal.SIGINT)
    assert (code, out, err.strip()) == (130, "", "interrupted")
    assert len(meanwhile) == 1 and os.listdir(tmp_path) == []


def test_an_interrupt_that_a_library_swallows_is_not_lost() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interrupts.catching():
        interrupts.raise_if_arrived()
        with contextlib.suppress(KeyboardInterrupt):  # as torch does while it is imported
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_if_arrived()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with interrupts.catching():
        interrupts.raise_if_arrived()  # the former block's


def test_an_ignored_signal_remains_ignored() -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what nohup and `&` do
    try:
        with interrupts.catching():
            signal.raise_signal(signal.SIGINT)
            interrupts.raise_if_arrived()
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_second_signal_waits_for_the_cleanup(
    yopo: Yopo, plan: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both come at the worst moments: in the middle of the copy, and before each cleanup step."""
    rmtree, steps = shutil.rmtree, []

    def again(path: Path, **options: object) -> None:
        steps.append(path.name)
        signal.raise_signal(signal.SIGINT)
        rmtree(path, **options)

    def stop(*arguments: object) -> None:
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(bake, "write_weights", stop)
    monkeypatch.setattr("yopo.support.scratch.shutil.rmtree", again)
    done = yopo("apply", plan, "--model", model, "-o", "out")
    assert (done.code, done.out, done.err.strip()) == (129, "", "hung up")  # the first one counts
    assert steps == ["new"] and os.listdir() == []


def test_a_signal_waits_until_the_result_is_in_place(
    yopo: Yopo, plan: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def interrupted_rename(old: Path, new: Path) -> None:
        if new.name == "out":
            signal.raise_signal(signal.SIGINT)
        rename(old, new)

    monkeypatch.setattr(os, "rename", interrupted_rename)
    done = yopo("apply", plan, "--model", model, "-o", "out")
    assert done.code == 130 and os.listdir() == ["out"] and Path("out/config.json").exists()


def test_a_closed_terminal_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise OSError(5, "Input/output error")

    def hang_up(arguments: object) -> int:
        monkeypatch.setattr(sys, "stderr", Gone())
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr("yopo.cli.group.run", hang_up)
    assert main([]) == 129
