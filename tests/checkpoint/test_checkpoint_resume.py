"""A killed `apply` goes on with its finished shards, and gives the bytes of one that was not."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from yopo.checkpoint import shards, weights
from yopo.checkpoint.bake import bake
from yopo.support.errors import OutputError
from yopo.support.scratch import find_leftovers

LAST = 14
"""Writes after which some shards are finished, and some are not."""

POINTS = (0, 1, 3, 7, 11, LAST)

KILLED = """
import os, pickle, signal, sys
from transformers import LlavaForConditionalGeneration
from yopo.checkpoint import shards, weights
from yopo.checkpoint.bake import bake
weights._threads = lambda count: (1, 1)
for line in sys.stdin:
    plan, source, folder, points = pickle.load(open(line.strip(), "rb"))
    for point in points:
        child = os.fork()  # imports once; nothing has computed with torch yet
        if child == 0:
            pwrite, calls = os.pwrite, []
            def write(*arguments):
                if len(calls) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(1)
                return pwrite(*arguments)
            os.pwrite = write
            bake(plan, source, os.path.join(folder, f"out-{point}"))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def case(saved, make_plan, tmp_path_factory):
    """(plan, source, result of a run that was not killed)."""
    made = saved("gqa")
    plan = make_plan(made.model)
    folder = tmp_path_factory.mktemp("whole")
    bake(plan, made.path, folder / "out")
    return plan, made.path, contents(folder / "out")


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the card, which says the directory's name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in _NAMED}


_NAMED = ("README.md", "yopo_files.json")


@pytest.fixture(scope="module")
def kill() -> Iterator[Callable[..., None]]:
    """Kills a run per point, after that many writes: (plan, source, folder, points)."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdin=pipe, stdout=pipe, text=True)

    def call(plan, source: Path, folder: Path, points: tuple[int, ...]) -> None:
        job = folder / "job"
        job.write_bytes(pickle.dumps((plan, source, str(folder), points)))
        process.stdin.write(f"{job}\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in points] == ["-9\n"] * len(points)
        job.unlink()

    with process:
        yield call


def written(monkeypatch) -> list[str]:
    """Record which shards are written."""
    names: list[str] = []
    write = weights.write_shard

    def record(source, *arguments, **options):
        names.append(source.name)
        return write(source, *arguments, **options)

    monkeypatch.setattr(weights, "write_shard", record)
    return names


def test_a_killed_run_goes_on_where_it_was(case, kill, tmp_path, monkeypatch) -> None:
    plan, source, expected = case
    kill(plan, source, tmp_path, POINTS)
    assert len(find_leftovers(tmp_path)) == len(POINTS)
    counts = []
    for point in POINTS:
        assert not (tmp_path / f"out-{point}").exists()
        names = written(monkeypatch)
        bake(plan, source, tmp_path / f"out-{point}")
        monkeypatch.undo()
        counts.append(len(names))
        assert contents(tmp_path / f"out-{point}") == expected
    total = len(list(source.glob("*.safetensors")))
    assert counts == sorted(counts, reverse=True) and counts[0] == total > counts[-1] > 0
    assert not find_leftovers(tmp_path)


@pytest.mark.parametrize("what", ["plan", "source"])
def test_another_plan_or_source_starts_anew(
    case, kill, saved, make_plan, tmp_path, monkeypatch, what
) -> None:
    plan, source, expected = case
    source = shutil.copytree(source, tmp_path / "source")
    kill(plan, source, tmp_path, (LAST,))
    if what == "plan":
        plan = make_plan(saved("gqa").model)
        order = plan.tensors.neuron_order
        order[0] = order[0].flip(0)
    else:
        for path in source.glob("*.safetensors"):
            found = path.stat()
            path.write_bytes(path.read_bytes())  # the same bytes, but yopo cannot know
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    names = written(monkeypatch)
    bake(plan, source, tmp_path / f"out-{LAST}")
    assert len(names) == len(list(source.glob("*.safetensors")))
    assert (contents(tmp_path / f"out-{LAST}") == expected) == (what == "source")
    assert len(find_leftovers(tmp_path)) == 1  # named and left to --clean


def test_unfinished_shards_and_foreign_files_of_a_leftover_are_not_used(
    case, kill, tmp_path, monkeypatch
) -> None:
    plan, source, expected = case
    kill(plan, source, tmp_path, (LAST,))
    (left,) = find_leftovers(tmp_path)
    first = min(path for path in (left / "new").glob("*.safetensors"))
    with first.open("r+b") as file:
        file.truncate(100)
    (left / "new" / "stranger").mkdir()
    bake(plan, source, tmp_path / f"out-{LAST}")
    assert contents(tmp_path / f"out-{LAST}") == expected


def test_two_runs_do_not_share_a_leftover(case, kill, tmp_path, monkeypatch) -> None:
    plan, source, expected = case
    kill(plan, source, tmp_path, (LAST,))
    write, inner, first = weights.write_shard, [], threading.Lock()

    def during(*arguments, **options):
        if first.acquire(blocking=False):  # shards are written by several threads
            inner.append(find_leftovers(tmp_path))
            bake(plan, source, tmp_path / f"out-{LAST}")
        return write(*arguments, **options)

    monkeypatch.setattr(weights, "write_shard", during)
    with pytest.raises(OutputError, match="exists already"):  # the inner run was first
        bake(plan, source, tmp_path / f"out-{LAST}")
    assert inner == [[]] and contents(tmp_path / f"out-{LAST}") == expected
    assert [path.name for path in tmp_path.iterdir()] == [f"out-{LAST}"]


def test_a_full_disk_after_a_kill_leaves_nothing(case, kill, tmp_path, monkeypatch) -> None:
    plan, source, _ = case
    kill(plan, source, tmp_path, (LAST,))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    with pytest.raises(OutputError, match="disk full"):
        bake(plan, source, tmp_path / f"out-{LAST}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", [(1, 1), (4, 1), (1, 2)])
def test_the_number_of_threads_does_not_change_a_byte(case, tmp_path, monkeypatch, threads) -> None:
    plan, source, expected = case
    monkeypatch.setattr(weights, "_threads", lambda count: threads)
    bake(plan, source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_rows_are_read_ahead_in_file_order(case, tmp_path, monkeypatch) -> None:
    """Every byte of every tensor whose rows are read in another order, in small requests."""
    plan, source, _ = case
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *span: asked.append(span[:2]))
    monkeypatch.setattr(shards, "MIN_READ", 1)
    monkeypatch.setattr(shards, "READ_AHEAD", 500)
    monkeypatch.setattr(weights, "_threads", lambda count: (1, 1))
    bake(plan, source, tmp_path / "out")
    starts, sizes = np.array(asked).T
    assert sizes.max() == 500 and len(asked) > 20
    ahead = [one + size == two for one, size, two in zip(starts, sizes, starts[1:], strict=False)]
    assert np.mean(ahead) > 0.5
