"""``torchrun -m yopo calibrate``: real processes make the plan of one, and end together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import FAST

from yopo.cli.main import _interrupted, main

MODELS = ("llava-tiny", "qwen2-vl-tiny", "internvl-tiny")
FITTED = (
    *("--samples", 32, "--batch-size", 3, "--max-new-tokens", 4),
    *("--budget", 0.2, "--compensation", "refit"),
)
"""Statistics, profile, a fitted plan and its judgement in a few seconds: 8 batches to fit on."""

_DRIVER = """
import os, signal, sys, time
from yopo.calibration import measure
from yopo.planning import allocations, weightings
from yopo.cli.main import main
from yopo.support import launched, ranks
from yopo.support.errors import DataError

manner, left, *calls = sys.argv[1:]
measure.PERIOD, left = 0.0, int(left)
weightings.VISUAL_WEIGHTS, allocations.GENERATIONS = (1.0,), 0
allocations.near = lambda weighting: ()
gather = ranks.distributed.all_gather_object

def failing(*arguments):
    global left
    left -= 1
    if os.environ["RANK"] == "1" and not left:
        if manner == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("row 7: holds a star, expected a square.", remedy="Draw a square.")
    return gather(*arguments)

def end_late(place):
    time.sleep(2.0)
    os.kill(os.getpid(), signal.SIGKILL)

ranks.distributed.all_gather_object = failing
if manner == "late" and os.environ["RANK"] == "1":
    launched.meet = end_late
for call in calls:
    code = main(call.split())
    if code:
        sys.exit(code)
"""
"""Runs command lines that measure one allocation; in the manner ``raise`` or ``kill``, process 1
ends as others wait for it; in the manner ``late``, as others wait for it to begin."""


def torchrun(
    folder: Path, processes: int, calls: list[tuple[object, ...]], manner: str = "run", at: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run command lines one after the other in processes that torchrun starts."""
    folder.mkdir(exist_ok=True)
    driver = folder / "driver.py"
    driver.write_text(_DRIVER)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    lines = [" ".join(map(str, call)) for call in calls]
    return subprocess.run(
        [sys.executable, *launch, str(driver), manner, str(at), *lines],
        cwd=folder,
        env={**os.environ, "YOPO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,  # a test that hangs fails
    )


def calibrate(model: str) -> tuple[object, ...]:
    stats = ("--stats", f"{model}.stats.safetensors")
    return ("calibrate", "--model", model, *FITTED, "-o", f"{model}.yaml", *stats)


def contents(folder: Path) -> dict[str, bytes]:
    """Names and bytes of plans, their tensors and statistics."""
    paths = sorted(folder.glob("*-tiny*"))
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes, without torchrun."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("yopo.planning.weightings.VISUAL_WEIGHTS", (1.0,))
        patch.setattr("yopo.planning.allocations.GENERATIONS", 0)
        patch.setattr("yopo.planning.allocations.near", lambda weighting: ())
        for model in MODELS:
            assert main([str(each) for each in calibrate(model)]) == 0
    return contents(folder)


def test_several_processes_write_the_bytes_of_one_once(
    tmp_path: Path, alone: dict[str, bytes]
) -> None:
    """Three, which cannot share eight batches evenly."""
    folder = tmp_path / "together"
    done = torchrun(folder, 3, [calibrate(model) for model in MODELS])
    assert done.returncode == 0, done.stderr
    assert len(alone) == 3 * len(MODELS), "a plan, its tensors and statistics each"
    assert contents(folder) == alone
    assert done.stderr.count("% of 20.0 % requested") == len(MODELS)
    assert done.stdout == ""


def test_a_process_that_fails_ends_all_with_its_sentence(tmp_path: Path) -> None:
    call = ("calibrate", "--model", "llava-tiny", *FAST, "-o", "llava-tiny.yaml")
    done = torchrun(tmp_path / "together", 2, [call], "raise", at=2)
    assert done.returncode == 1
    assert "error: row 7: holds a star, expected a square.\n  Draw a square.\n" in done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "terminated\n" not in done.stderr
    assert not contents(tmp_path / "together")


def test_a_killed_process_ends_all_and_any_number_go_on(
    tmp_path: Path, alone: dict[str, bytes]
) -> None:
    folder = tmp_path / "together"
    call = (*calibrate("llava-tiny"), "--work-dir", "work", "--force")
    done = torchrun(folder, 2, [call], "kill", at=20)
    assert done.returncode == 1
    sentence = "error: process 1 of 2 ended unexpectedly, and so does the command.\n"
    assert sentence in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert not {name for name in contents(folder) if name.endswith(".yaml")}
    kept = {path.name for path in (folder / "work").glob("*.safetensors")}
    assert "profile-000.safetensors" in kept and "profile.safetensors" not in kept
    done = torchrun(folder, 3, [call])
    assert done.returncode == 0, done.stderr
    assert contents(folder) == {
        name: data for name, data in alone.items() if name.startswith("llava-tiny")
    }


def test_a_process_that_never_begins_ends_all(tmp_path: Path) -> None:
    """torchrun's signal is heard by those who wait: it kills, without a word, 30 seconds later."""
    folder = tmp_path / "together"
    done = torchrun(folder, 2, [calibrate("llava-tiny")], "late")
    assert done.returncode == 1
    sentence = "error: process 1 of 2 ended unexpectedly, and so does the command.\n"
    assert sentence in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert not contents(folder)


def test_a_signal_before_others_are_known_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("yopo.support.launched.processes", lambda: 2)
    monkeypatch.setattr("yopo.support.launched.speaks", lambda: True)
    monkeypatch.setattr("yopo.support.launched.loss", lambda: None)
    for word, code in (("terminated", 143), ("interrupted", 130)):
        monkeypatch.setattr("yopo.cli.main.outcome", lambda said=word, number=code: (said, number))
        assert _interrupted() == code
        said = capsys.readouterr().err
        assert said.startswith(word)
        assert ("by torchrun, which was told to end, or lost" in said) == (word == "terminated")


def test_other_commands_run_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["inspect", "plan.yaml"]) == 2
    assert "`yopo inspect` runs in one process, not in 3" in capsys.readouterr().err
