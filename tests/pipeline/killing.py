"""Calibrations that are killed in stages chosen beforehand: how to start, watch and kill them.

Every process of a run says in a log of its own what it begins, so a kill hits the stage that it is
meant for, whatever the machine does meanwhile.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

STAGES = ("starting", "statistics", "profile", "fit", "answers", "judging", "writing")
"""What a calibration does, in this order; fits and judgements of several groups of plans alternate.
"""

_SETUP = """
import os, sys, time

from yopo.cli import group
from yopo.cli.main import main


def prepare():
    from yopo.calibration import measure
    from yopo.cli import calibrate
    from yopo.fitting import fitter
    from yopo.pipeline import judge, session
    from yopo.planning import allocations, weightings

    measure.PERIOD = 0.0
    weightings.VISUAL_WEIGHTS, allocations.GENERATIONS = (1.0, 10.0), 0
    allocations.near = weightings.near = lambda weighting: ()
    telling(session, "measure", "statistics")
    telling(fitter, "profile", "profile")
    telling(fitter, "refit", "fit")
    telling(judge, "record_dense", "answers")
    telling(judge, "compare", "judging")
    telling(calibrate, "save", "writing")


def telling(module, name, stage):
    original = getattr(module, name)

    def told(*arguments, **options):
        begin(stage)
        return original(*arguments, **options)

    setattr(module, name, told)


def begin(stage):
    with open(sys.argv[1] + os.environ.get("RANK", "0"), "a") as log:
        log.write(f"{time.monotonic()} {stage}\\n")
"""

_ONE = """
prepare()
print(0, flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.close(0)
        begin("starting")
        os._exit(main(line.split()))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs one command line after the other, each in a process that has imported everything."""

_EACH = """
run = group.run


def prepared(arguments):
    begin("starting")
    prepare()
    return run(arguments)


group.run = prepared
sys.exit(main(sys.argv[2:]))
"""
"""Runs a command line; imports what takes time where the command does it."""


@dataclass
class Begun:
    """A line of a log.

    Attributes:
        at: Seconds on the clock of ``time.monotonic``.
        stage: One of ``STAGES``.
    """

    at: float
    stage: str


class Runner:
    """Starts calibrations in a folder.

    Args:
        folder: For drivers, logs and messages.
    """

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.log, self.messages = folder, folder / "log.", folder / "messages"

    def begun(self, rank: int = 0) -> list[Begun]:
        """What a process of the present run has begun so far."""
        try:
            lines = Path(f"{self.log}{rank}").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        words = (line.split() for line in lines if line.endswith("\n"))
        return [Begun(float(at), stage) for at, stage in words]

    def _forget(self) -> None:
        for path in self.folder.glob("log.*"):
            path.unlink()
        self.messages.write_text("")


class Forked(Runner):
    """Single processes, forked from one that has imported everything."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._messages = self.messages.open("a")
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SETUP + _ONE, str(self.log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
        )
        self._process = self._next()  # once everything is imported

    def start(self, arguments: Sequence[object]) -> None:
        """Run a command line."""
        self._forget()
        assert self._server.stdin is not None
        self._server.stdin.write(" ".join(map(str, arguments)) + "\n")
        self._server.stdin.flush()
        self._process = self._next()

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return is_running(self._process)

    def code(self) -> int:
        """The exit code, once it has ended."""
        return self._next()

    def close(self) -> None:
        """End the process that others are forked from."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()
        self._messages.close()

    def _next(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


class Launched(Runner):
    """Processes that ``torchrun`` starts."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._driver = folder / "driver.py"
        self._driver.write_text(_SETUP + _EACH)
        self._launcher: subprocess.Popen[bytes] | None = None

    def start(self, arguments: Sequence[object], processes: int) -> None:
        """Run a command line in several processes."""
        self._forget()
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
        line = [sys.executable, *launch, self._driver, self.log, *arguments]
        with self.messages.open("w") as messages:
            self._launcher = subprocess.Popen(
                list(map(str, line)),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=messages,
                stderr=messages,
            )
        until = time.monotonic() + 60
        while not all(self.begun(rank) for rank in range(processes)):
            assert self.runs and time.monotonic() < until, self.messages.read_text()
            time.sleep(0.01)

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that run."""
        assert self._launcher is not None
        found = {}
        for pid in children_of(self._launcher.pid):
            with suppress(OSError):
                entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                numbers = [int(each[5:]) for each in entries if each.startswith(b"RANK=")]
                found.update(dict.fromkeys(numbers, pid))
        return found

    def kill(self, rank: int | None) -> None:
        """Kill one process, or (None) all and the launcher, unless they have ended."""
        assert self._launcher is not None
        pids = self.ranks()
        victims = [self._launcher.pid, *pids.values()] if rank is None else [pids.get(rank)]
        for pid in victims:
            with suppress(ProcessLookupError):
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)

    @property
    def runs(self) -> bool:
        """Whether the launcher has not ended."""
        return self._launcher is not None and self._launcher.poll() is None

    def code(self, timeout: float = 300) -> int:
        """The launcher's exit code, once it has ended."""
        assert self._launcher is not None
        return self._launcher.wait(timeout)


def is_running(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid: int) -> list[int]:
    """Process ids of the children that any thread of a process started."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def durations(begun: Sequence[Begun], end: float) -> dict[str, float]:
    """Seconds that each stage takes, at the first time."""
    found: dict[str, float] = {}
    for one, next_ in pairwise([*begun, Begun(end, "")]):
        found.setdefault(one.stage, next_.at - one.at)
    return found


def wait_for(runner: Forked | Launched, stage: str, rank: int = 0) -> bool:
    """Wait until a stage, or a later one, is under way; false if the run ends before."""
    until = time.monotonic() + 300
    while runner.runs:
        begun = runner.begun(rank)
        if begun and STAGES.index(begun[-1].stage) >= STAGES.index(stage):
            return True
        assert time.monotonic() < until, f"{stage}: not reached"
        time.sleep(0.002)
    return False


class Deck:
    """Stages to be killed in, each about as often, in random order.

    Args:
        kills: Their number.
        draw: The order.
    """

    def __init__(self, kills: int, draw: random.Random):
        self.left = [STAGES[number % len(STAGES)] for number in range(kills)]
        draw.shuffle(self.left)

    def deal(self, most: int) -> list[str]:
        """Take stages for one calibration, in their order."""
        part, self.left = self.left[:most], self.left[most:]
        return sorted(part, key=STAGES.index)

    def back(self, stage: str) -> None:
        """Put a stage back: the run had ended before it was killed."""
        self.left.append(stage)
