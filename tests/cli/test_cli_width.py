"""Tables fit 60 columns, in ASCII where the terminal shows nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import DRAWINGS, FAST, Yopo

WIDTH = 60
NARROW = {"COLUMNS": str(WIDTH), "LC_ALL": "C"}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in NARROW.items():
        monkeypatch.setenv(name, value)


def check(text: str) -> None:
    assert text.isascii() and "?" not in text.replace("?\n", "")
    assert max(map(len, text.splitlines())) <= WIDTH, text
    assert not re.search(r"\.\.$|^ +(%|ms|[KMG]?B)$", text, flags=re.MULTILINE), text  # cut, broken


def test_eval(yopo: Yopo, calibrated: Path, pairs: Path) -> None:
    options = ("--samples", 16, "--max-new-tokens", 2, "--timing-runs", 3)
    done = yopo("eval", calibrated / "plan.yaml", "--data", pairs, *options)
    assert done.code == 0
    check(done.out)
    row = r"^[> ]  (\w+) +\d+( +\d+ +\d+ +\d+ +[\d.]+ % +[\d.]+)$"
    rows = re.findall(row, done.out, flags=re.MULTILINE)
    assert {"position", "count"} < {name for name, _ in rows} and len(rows) == 6


def test_bench(yopo: Yopo) -> None:
    sizes = ("--visual-tokens", 16, "--text-tokens", 8, "--layers", 2)
    done = yopo("bench", "--preset", "yopo-25", *sizes, "--runs", 2, "--decode-steps", 1)
    assert done.code == 0, done.err
    check(done.out)


def test_candidates(yopo: Yopo, model: Path) -> None:
    done = yopo("calibrate", "--model", model, *DRAWINGS, *FAST, "-o", "plan.yaml")
    assert done.code == 0
    start = done.err.index("   template")
    check(done.err[start : done.err.index("plan.yaml: ", start)])
    names = re.findall(r"^[> ]  (\S.*?)  +refit", done.err[start:], flags=re.MULTILINE)
    assert len(names) == len(set(names)) == 5  # none is cut to what others share
