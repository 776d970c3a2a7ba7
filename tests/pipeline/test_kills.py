"""Calibrations killed by SIGKILL in every stage end with the bytes of one that was not."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from killing import STAGES, Deck, Forked, Launched, durations, wait_for

from yopo.pipeline.work_status import status_of
from yopo.support.errors import OutputError
from yopo.support.scratch import find_leftovers

KILLS = int(os.environ.get("YOPO_KILLS", "7"))
LAUNCHED_KILLS = int(os.environ.get("YOPO_KILLS", "2"))
PER_RUN = 5
"""Kills of one calibration before it may end."""

SEED = int(os.environ.get("YOPO_SEED", "0"))
PATIENCE = 90.0
"""Seconds after which a launched calibration must have ended with its process."""


def command(folder: Path, *more: str) -> list[object]:
    return [
        *("calibrate", "--model", "llava-tiny", "--samples", 32, "--batch-size", 2, "-q"),
        *("--measure-pairs", 8, "--fit-pairs", 8, "--max-new-tokens", 2, "--device", "cpu"),
        *("--budget", 0.3, "--compensation", "refit", "--work-dir", folder / "work", "--force"),
        *("-o", folder / "plan.yaml", "--stats", folder / "stats.safetensors", *more),
    ]


def outputs(folder: Path) -> dict[str, bytes]:
    """Files by name; a run that was killed as it wrote its plan leaves a scratch directory."""
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}


class Calibration:
    """One calibration that is killed several times, and what must hold after every kill.

    Args:
        folder: Where it works and writes.
        expected: What one that is never killed writes.
    """

    def __init__(self, folder: Path, expected: dict[str, bytes]):
        folder.mkdir()
        self.folder, self.work, self.expected = folder, folder / "work", expected
        self._furthest = STAGES[0]

    def check_running(self, runner: Forked | Launched) -> None:
        """The status of a run that is under way says so."""
        with suppress(OutputError):  # there is nothing yet
            stages = [runner.begun()[-1].stage]
            first, *_ = status_of(self.work)
            stages.append(runner.begun()[-1].stage)
            if runner.runs and not {"starting", "writing"} & {*stages}:
                assert "in progress" in first or (stages[1] == "judging" and "finished" in first)

    def check_killed(self, stage: str) -> None:
        """Nothing is there that looks finished, and the status fits the stage."""
        self._furthest = max(self._furthest, stage, key=STAGES.index)
        for name, data in outputs(self.folder).items():
            assert data == self.expected[name], f"{name} after a kill in {stage}"
        if "plan.yaml" in outputs(self.folder):
            assert self._furthest == "writing"
        self._check_status(self._furthest)

    def _check_status(self, stage: str) -> None:
        """What ``--status`` says fits what the furthest run was in the middle of."""
        until = time.monotonic() + 5  # threads of a killed process may still be ending
        try:
            while "in progress" in (status := status_of(self.work))[0]:
                assert time.monotonic() < until, "the directory stays locked"
            first, *lines = status
        except OutputError as error:
            assert "holds no work" in str(error) and stage == "starting"
            assert not (self.work / "work.json").exists()
            return
        said = f"killed in {stage}: {[first, *lines]}"
        found = dict(line.split(": ", 1) for line in lines)
        assert "interrupted" in first or (stage == "writing" and "finished" in first), said
        begun, judged = STAGES.index(stage), int(found["plans"].split()[0])
        for name in ("statistics", "profile"):
            assert found[name] == "done" or begun <= STAGES.index(name), said
        if stage in ("judging", "writing"):
            assert found["dense answers"] == "done", said
        assert judged > 0 or stage != "writing", said
        if found["statistics"] != "done":
            assert begun <= STAGES.index("statistics") and not judged, said
            assert "done" not in (found["profile"], found["dense answers"]), said

    def check_finished(self) -> None:
        """The bytes are those of a calibration that was not killed; nothing is left behind."""
        assert outputs(self.folder) == self.expected
        folders = {each for each in self.folder.iterdir() if each.is_dir()} - {self.work}
        assert folders == {*find_leftovers(self.folder)}, "`apply --clean` would not tidy up"
        names = [each.name for each in self.work.iterdir()]
        rest = [name for name in names if not name.endswith(".safetensors")]
        assert sorted(rest) == ["lock", "work.json"]
        assert "finished" in status_of(self.work)[0]


def show(kind: str, hit: Counter[str]) -> None:
    """A row for each stage: how many kills hit it."""
    rows = [f"{stage} {hit[stage]}" for stage in STAGES]
    print(f"\n{kind}: {', '.join(rows)}; {hit.total()} kills", file=sys.stderr)


# One process


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    runner = Forked(tmp_path_factory.mktemp("forked") / "runner")
    yield runner
    runner.close()


@pytest.mark.parametrize("offload", ["never", "always"])
def test_one_process(tmp_path: Path, forked: Forked, offload: str) -> None:
    options = ("--offload", offload)
    (tmp_path / "whole").mkdir()
    forked.start(command(tmp_path / "whole", *options))
    assert forked.code() == 0, forked.messages.read_text()
    takes = durations(forked.begun(), time.monotonic())
    assert takes.keys() == set(STAGES)
    expected, draw, hit = outputs(tmp_path / "whole"), random.Random(SEED), Counter[str]()
    for one, deck in calibrations(tmp_path, expected, KILLS, draw):
        for stage in deck.deal(PER_RUN):
            forked.start(command(one.folder, *options))
            if wait_for(forked, stage):
                time.sleep(draw.uniform(0, takes[stage]))
                one.check_running(forked)
                forked.kill()
            if forked.code() == 0:
                one.check_finished()
                deck.back(stage)
                takes[stage] /= 2  # it took longer when it was timed
                continue
            reached = forked.begun()[-1].stage
            hit[reached] += 1
            one.check_killed(reached)
        forked.start(command(one.folder, *options))
        assert forked.code() == 0, forked.messages.read_text()
        one.check_finished()
    show(f"offload {offload}", hit)


def calibrations(
    folder: Path, expected: dict[str, bytes], kills: int, draw: random.Random
) -> Iterator[tuple[Calibration, Deck]]:
    """One calibration after the other, until a deck of kills is used up."""
    deck, number = Deck(kills, draw), 0
    while deck.left:
        number += 1
        assert number <= 2 * kills, "hardly any run was killed"
        yield Calibration(folder / f"killed-{number}", expected), deck


# Several processes


def test_launched_processes(tmp_path: Path) -> None:
    runner, draw, hit = Launched(tmp_path / "runner"), random.Random(SEED), Counter[str]()
    (tmp_path / "whole").mkdir()
    runner.start(command(tmp_path / "whole"), processes=2)
    assert runner.code() == 0, runner.messages.read_text()
    takes = durations(runner.begun(), time.monotonic())
    expected, manners = outputs(tmp_path / "whole"), Counter[str]()
    for one, deck in calibrations(tmp_path, expected, LAUNCHED_KILLS, draw):
        for stage in deck.deal(PER_RUN):
            processes = draw.randint(1, 3)
            victim = draw.choice([None, *range(processes)]) if processes > 1 else None
            runner.start(command(one.folder), processes)
            if wait_for(runner, stage, victim or 0):
                time.sleep(draw.uniform(0, takes[stage]))
                one.check_running(runner)
                runner.kill(victim)
            reached = runner.begun(victim or 0)[-1].stage
            if ended(runner, victim, processes, reached):
                hit[reached] += 1
                manners["all" if victim is None else "one"] += 1
                one.check_killed(reached)
            else:
                one.check_finished()
                deck.back(stage)
                takes[stage] /= 2  # it took longer when it was timed
        runner.start(command(one.folder), draw.randint(1, 3))
        assert runner.code() == 0, runner.messages.read_text()
        one.check_finished()
    show(f"launched, {manners['one']} times one process and {manners['all']} times all", hit)


def ended(runner: Launched, victim: int | None, processes: int, stage: str) -> bool:
    """Wait until all have ended, and check what they said; whether the kill came in time."""
    code = runner.code(PATIENCE)
    said = runner.messages.read_text()
    if code == 0:
        assert "error: " not in said
        return False
    if victim is not None:
        sentences = [f"error: process {victim} of {processes} ended unexpectedly"]
        if stage == "starting":  # before it had told the others that it is there
            sentences.append("terminated by torchrun, which was told to end, or lost another")
        found = [sentence for sentence in sentences if sentence in said]
        assert len(found) == 1 or stage == "writing", said  # then others may be done
        assert said.count("error: ") <= 1 and "unexpected error" not in said, said
    return True
