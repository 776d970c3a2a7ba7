"""Copying a shard with some tensors reordered: every axis, dtype, chunk size and way to copy."""

from __future__ import annotations

import errno
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from yopo.checkpoint import shards
from yopo.checkpoint.headers import read_shard
from yopo.checkpoint.shards import Reorder, plan_steps, write_shard
from yopo.support.errors import CheckpointError

UNITS, BLOCK, OTHER = 6, 4, 10


def reorders(block: int = BLOCK) -> dict[str, Reorder]:
    order = np.array([3, 0, 5, 1, 4, 2])
    axes = {"rows": 0, "columns": 1, "bias": 0}
    return {name: Reorder(order, axis, block) for name, axis in axes.items()}


def make_tensors(dtype: torch.dtype, block: int) -> dict[str, torch.Tensor]:
    def count(*shape: int) -> torch.Tensor:
        return torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)

    width = UNITS * block
    return {
        "a.first": count(3, 5),
        "rows": count(width, OTHER),
        "between": count(7),
        "columns": count(OTHER, width),
        "bias": count(width),
        "z.last": count(2),
    }


def expected(tensors: dict[str, torch.Tensor], block: int) -> dict[str, torch.Tensor]:
    result = dict(tensors)
    for name, reorder in reorders(block).items():
        index = [old * block + offset for old in reorder.order for offset in range(block)]
        result[name] = tensors[name].index_select(reorder.axis, torch.tensor(index))
    return result


def run(source: Path, target: Path, changes: dict[str, Reorder]) -> int:
    shard = read_shard(source)
    return sum(len(step) for step in write_shard(source, target, shard, changes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("block", [1, 3, BLOCK])
@pytest.mark.parametrize("chunk", [1, 50, 2**24])
@pytest.mark.parametrize("min_read", [1, 10**6], ids=["by row", "whole"])
def test_only_the_given_tensors_are_reordered(
    tmp_path, monkeypatch, dtype, block, chunk, min_read
) -> None:
    monkeypatch.setattr(shards, "CHUNK", chunk)
    monkeypatch.setattr(shards, "MIN_READ", min_read)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = make_tensors(dtype, block)
    save_file(tensors, source, metadata={"format": "pt"})
    assert run(source, target, reorders(block)) == len(tensors)
    found = load_file(target)
    for name, tensor in expected(tensors, block).items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
    start = min(entry.start for entry in read_shard(source).tensors)
    assert target.read_bytes()[:start] == source.read_bytes()[:start]


@pytest.mark.parametrize("reason", [None, errno.EXDEV, errno.ENOSYS])
def test_shards_are_copied_with_and_without_kernel_copies(tmp_path, monkeypatch, reason) -> None:
    if reason is None:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:

        def refuse(*args):
            raise OSError(reason, os.strerror(reason))

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(make_tensors(torch.float32, BLOCK), source)
    run(source, target, {})
    assert target.read_bytes() == source.read_bytes()


def test_copy_steps_cover_the_file_exactly_once(tmp_path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(make_tensors(torch.float32, BLOCK), source)
    shard = read_shard(source)
    position = 0
    for step in plan_steps(shard, reorders()):
        assert step.start == position < step.stop
        position = step.stop
    assert position == shard.size


@pytest.mark.parametrize("changes", [{}, reorders()], ids=["copied", "reordered"])
def test_a_source_that_shrinks_is_noticed(tmp_path, changes) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(make_tensors(torch.float32, BLOCK), source)
    shard = read_shard(source)
    os.truncate(source, shard.size - 900)
    with pytest.raises(CheckpointError, match="became shorter"):
        list(write_shard(source, target, shard, changes))


@pytest.mark.parametrize("in_kernel", [True, False], ids=["by the kernel", "by hand"])
@pytest.mark.parametrize("min_read", [1, 10**6], ids=["by row", "whole"])
@pytest.mark.parametrize("most", [1, 7, 100])
def test_short_reads_and_writes_resume_where_they_stopped(
    tmp_path, monkeypatch, most, min_read, in_kernel
) -> None:
    """Signals and network file systems may cut reads and writes short at any byte."""
    preadv, pwrite, cut = os.preadv, os.pwrite, {"preadv": 0, "pwrite": 0, "copy_file_range": 0}

    def short_read(file, buffers, start):
        (view,) = buffers
        cut["preadv"] += len(view) > most
        return preadv(file, [view[:most]], start)

    def short_write(file, data, start):
        cut["pwrite"] += len(data) > most
        return pwrite(file, data[:most], start)

    def short_copy(source, target, size, source_start, target_start):
        cut["copy_file_range"] += size > most
        return pwrite(target, os.pread(source, min(size, most), source_start), target_start)

    tensors = make_tensors(torch.float32, BLOCK)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source)
    monkeypatch.setattr(shards, "MIN_READ", min_read)
    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwrite", short_write)
    if in_kernel:
        monkeypatch.setattr(os, "copy_file_range", short_copy, raising=False)
    else:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    run(source, target, reorders())
    monkeypatch.undo()
    assert cut["preadv"] and cut["pwrite"] and bool(cut["copy_file_range"]) == in_kernel
    found = load_file(target)
    for name, tensor in expected(tensors, BLOCK).items():
        assert torch.equal(found[name], tensor), name
    assert target.stat().st_size == source.stat().st_size


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("min_read", [1, 10**6], ids=["by row", "whole"])
@pytest.mark.parametrize("changes", [{}, reorders()], ids=["copied", "reordered"])
def test_a_source_that_ends_in_the_middle_of_a_read_is_noticed(
    tmp_path, monkeypatch, after, min_read, changes
) -> None:
    """The read returns a part and then nothing; leftover memory must not be written."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(make_tensors(torch.float32, BLOCK), source)
    shard = read_shard(source)
    preadv, calls = os.preadv, []

    def run_dry(file, buffers, start):
        calls.append(start)
        (view,) = buffers
        assert len(calls) < 100, "asked for more again and again"
        if len(calls) > after + 1:
            return 0
        return preadv(file, [view[: len(view) // 2]] if len(calls) > after else buffers, start)

    monkeypatch.setattr(shards, "MIN_READ", min_read)
    monkeypatch.setattr(shards, "CHUNK", 64)
    monkeypatch.setattr(shards, "WORKERS", 1)
    monkeypatch.setattr(os, "preadv", run_dry)
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    with pytest.raises(CheckpointError, match="became shorter"):
        list(write_shard(source, target, shard, changes))
    assert after + 2 <= len(calls) < 100


def test_workers_stop_when_the_consumer_stops(tmp_path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(make_tensors(torch.float32, BLOCK), source)
    steps = write_shard(source, target, read_shard(source), reorders())
    next(steps)
    assert any(thread.name.startswith("yopo-bake") for thread in threading.enumerate())
    steps.close()
    assert not any(thread.name.startswith("yopo-bake") for thread in threading.enumerate())


def test_a_worker_holds_only_a_few_chunks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "CHUNK", 2**16)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    size = 2**20
    save_file({name: torch.zeros(256, 1024) for name in ("x", "y", "z")}, source)
    shard = read_shard(source)
    changes = {
        "x": Reorder(np.arange(256)[::-1], 0, 1),
        "y": Reorder(np.arange(256)[::-1], 1, 4),
        "z": Reorder(np.arange(1024)[::-1], 1, 1),
    }
    assert shard.tensors[0].num_bytes == size
    tracemalloc.start()
    try:
        list(write_shard(source, target, shard, changes))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * shards.WORKERS * shards.CHUNK < size / 2
