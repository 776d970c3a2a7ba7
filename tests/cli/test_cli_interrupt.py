"""Ctrl-C, SIGTERM and SIGHUP may come at any time: real signals to a real process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import DRAWINGS, FAST, Yopo

from yopo.calibration.statistics_file import load_statistics
from yopo.checkpoint import bake
from yopo.cli import interrupts
from yopo.cli.main import main

_DRIVER = """
import importlib, json, os, sys, time
import transformers.modeling_utils, yopo.checkpoint.bake, yopo.cli.calibrate, yopo.cli.results
import yopo.calibration.measure, yopo.demo.pair_files
from yopo.cli.main import main

for line in sys.stdin:
    folder, cache, out, err, (name, function), arguments = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    os.environ["YOPO_CACHE"] = cache
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    module = importlib.import_module(name)
    original = getattr(module, function)

    def stop_here(*arguments, **options):
        original(*arguments, **options)
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)

    setattr(module, function, stop_here)
    sys.exit(main(arguments))
"""
"""Imports once, and forks a process per command line, which pauses at a function's first call."""

Interrupted = Callable[..., tuple[int, str, str, list[str]]]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interrupted]:
    """Interrupts a command line where it pauses.

    Returns (exit code, stdout, stderr after "ready", the folder's content during the pause).
    """
    pipe, logs = subprocess.PIPE, tmp_path_factory.mktemp("said")
    server = subprocess.Popen([sys.executable, "-c", _DRIVER], stdin=pipe, stdout=pipe, text=True)

    def call(
        place: tuple[str, str], arguments: list[object], folder: Path, number: signal.Signals
    ) -> tuple[int, str, str, list[str]]:
        out, err = (Path(tempfile.mkstemp(dir=logs)[1]) for _ in range(2))
        where = [str(each) for each in (folder, folder / "cache", out, err)]
        server.stdin.write(f"{json.dumps([*where, place, [*map(str, arguments)]])}\n")
        server.stdin.flush()
        process, until = int(server.stdout.readline()), time.monotonic() + 120
        try:
            while "ready\n" not in err.read_text():
                assert time.monotonic() < until, err.read_text()
                time.sleep(0.01)
            meanwhile = os.listdir(folder)
            os.kill(process, number)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            raise
        finally:
            code = int(server.stdout.readline())
        return code, out.read_text(), err.read_text().partition("ready\n")[2], meanwhile

    with server:
        yield call


OUTCOMES = {
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
    signal.SIGHUP: (129, "hung up"),
}


@pytest.mark.parametrize("number", OUTCOMES)
def test_an_interrupted_bake_leaves_nothing(
    interrupted: Interrupted, plan: Path, model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    place = ("yopo.checkpoint.bake", "write_weights")
    found = interrupted(place, ["apply", plan, "--model", model, "-o", "out"], work, number)
    code, out, err, meanwhile = found
    assert (code, err.strip()) == OUTCOMES[number] and out == ""
    assert len(meanwhile) == 1 and meanwhile[0].startswith(".out.yopo-")  # it was in the middle
    assert os.listdir(work) == []


def test_an_interrupted_calibration_leaves_nothing(
    interrupted: Interrupted, model: Path, tmp_path: Path
) -> None:
    arguments = ["calibrate", "--model", model, *FAST, *DRAWINGS, "--stats", "s.safetensors"]
    place = ("yopo.calibration.measure", "_observe")
    code, out, err, _ = interrupted(place, arguments, tmp_path, signal.SIGINT)
    assert (code, out, err.strip()) == (130, "", "interrupted")
    assert os.listdir(tmp_path) == []


def test_statistics_are_written_before_planning_starts(
    interrupted: Interrupted, model: Path, tmp_path: Path
) -> None:
    arguments = ["calibrate", "--model", model, *FAST, *DRAWINGS, "--stats", "s.safetensors"]
    place = ("yopo.cli.results", "write_file")
    code, out, err, _ = interrupted(place, arguments, tmp_path, signal.SIGTERM)
    assert (code, out, err.strip()) == (143, "", "terminated")
    assert os.listdir(tmp_path) == ["s.safetensors"]
    assert (
        len(load_statistics(tmp_path / "s.safetensors").rho) == 24
    )  # of 32; the others are held out


def test_an_interrupted_write_of_pairs_leaves_nothing(
    interrupted: Interrupted, tmp_path: Path
) -> None:
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
