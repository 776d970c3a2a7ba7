"""``scripts/limits.py`` measures every row and leaves no files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def same_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sync", lambda: None)  # a busy disk would keep the test waiting
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def table(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_every_part_is_measured(
    script, tiny_shape: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.try_few_plans(monkeypatch)
    small = [
        "--samples",
        "40",
        "--layers",
        "2",
        "--runs",
        "1",
        "--visual-tokens",
        "64",
        "--text-tokens",
        "9",
    ]
    limits = script("limits")
    parts = ["--parts", *limits.PARTS]
    limits.main(["--shape-of", tiny_shape, "--folder", str(tmp_path), *small, *parts])
    rows = table(capsys.readouterr().out)
    assert len(rows) == 14
    for what, (*_, ratio, target) in rows.items():
        assert float(ratio) > 0 and target[0] in "<>-", what
    assert not list(tmp_path.iterdir())


def test_turns_alternate_and_the_first_pair_is_not_counted(script) -> None:
    order = []
    script("limits").take_turns(lambda: order.append("a"), lambda: order.append("b"), 3)
    assert "".join(order) == "baabbaab"


def test_calibration_runs_the_same_pass_as_a_plain_forward(script, tiny_shape: str) -> None:
    limits = script("limits")
    options = limits.arguments(["--shape-of", tiny_shape, "--layers", "2"])
    subject = limits.Calibration(options)
    plain = subject.forward().last_hidden_state
    shown = subject.show_attention()
    subject.calibrate()
    assert [tuple(each.shape) for each in shown] == [(1, 4, 640, 640)] * 2
    assert torch.equal(subject.forward().last_hidden_state, plain)  # nothing is left switched on
