"""Layers stay on disk where they are to, or where weights do not fit; plans are the same."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from fetches import count_fetches, of_decoder

from yopo.checkpoint.reader import Checkpoint
from yopo.cli.group import cli
from yopo.demo import LLAVA_TINY
from yopo.models.offloaded import at_hand, is_offloaded
from yopo.pipeline.commands import calibrate, evaluate
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.request import BudgetRequest
from yopo.plans.storage import write_plan
from yopo.serving import layers_on_disk


@pytest.mark.parametrize(
    ("offload", "free", "expected"),
    [
        ("never", 1 << 40, False),
        ("auto", 1 << 40, False),
        ("auto", 6 << 20, True),
        ("always", 1 << 40, True),
    ],
)
def test_where_layers_are(
    offload: str, free: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_on_disk, "free_memory", lambda device: free)
    handle = ModelHandle("llava-tiny", None, RunOptions(offload=offload))  # type: ignore[arg-type]
    decoder = handle.model.get_decoder()
    assert is_offloaded(decoder) == expected
    assert all(each.is_meta == expected for each in decoder.layers.parameters())


@pytest.mark.parametrize("fit", [3, 8])
def test_pages_of_layers_that_do_not_fit_are_dropped_after_use(
    fit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, start, size, __: dropped.append((start, size))
    )
    checkpoint = Checkpoint.open(LLAVA_TINY)
    sizes = Counter({number: 0 for number in range(8)})
    for (number, _), entry in checkpoint.decoder.items():
        sizes[number] += entry.num_bytes
    free = sum(sizes[number] for number in range(fit)) / layers_on_disk.CACHED
    monkeypatch.setattr(layers_on_disk, "available_bytes", lambda: free)
    model = ModelHandle("llava-tiny", None, RunOptions(offload="always")).model
    for number, layer in enumerate(model.get_decoder().layers):
        for _ in range(2):
            with at_hand(layer), at_hand(layer):
                assert not dropped
            entries = [each for (place, _), each in checkpoint.decoder.items() if place == number]
            expected = [(each.start, each.num_bytes) for each in entries if number >= fit]
            assert sorted(dropped) == sorted(expected)
            dropped.clear()


def test_calibration_is_the_same(tmp_path: Path) -> None:
    request = BudgetRequest(0.12, template="reader", compensation="refit")
    made = []
    for offload in ("never", "always"):
        options = RunOptions(samples=32, max_new_tokens=3, offload=offload)  # type: ignore[arg-type]
        fit = FitOptions(work_dir=tmp_path / offload)
        made.append(calibrate("llava-tiny", request, options=options, fit_options=fit).plan)
    assert made[0].tensors.refit
    one, other = (tmp_path / str(number) / "plan.yaml" for number in range(2))
    for plan, path in zip(made, (one, other), strict=True):
        path.parent.mkdir()
        write_plan(plan, path)
    for path in one.parent.iterdir():
        assert path.read_bytes() == (other.parent / path.name).read_bytes()


def test_an_evaluation_is_the_same_and_reads_layers_once_per_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = count_fetches(monkeypatch)
    options = RunOptions(samples=16, max_new_tokens=3, batch_size=4)
    plan = calibrate("llava-tiny", BudgetRequest(0.25, template="reader"), options=options).plan
    usual = evaluate(plan, options=options, timing_runs=0)
    assert not reads
    capsys.readouterr()
    found = evaluate(plan, options=replace(options, offload="always"))
    assert "Prefill is not timed" in capsys.readouterr().err
    assert found.to_dict() == usual.to_dict()
    assert found.kept.answers == usual.kept.answers
    # To load and to identify the model; both models' answers and predictions along them.
    assert set(of_decoder(reads).values()) == {2 + 2 * (3 + 1)}


@pytest.mark.parametrize("command", [("calibrate", "--model", "llava-tiny"), ("eval", "plan.yaml")])
def test_a_device_map_says_it_already(command: tuple[str, ...]) -> None:
    found = CliRunner().invoke(cli, [*command, "--offload", "always", "--device-map", "auto"])
    assert found.exit_code == 2
    assert "exclude one another" in found.output
