"""``yopo report`` and the files that it reads, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Yopo

from yopo.support.files import PAGE_MARK


def test_an_evaluation_with_examples_becomes_a_page(
    yopo: Yopo, calibrated: Path, pairs: Path
) -> None:
    plan, data = calibrated / "plan.yaml", ("--data", pairs, "--samples", 16)
    options = ("--max-new-tokens", 2, "--timing-runs", 0, "--examples", 3, "-o", "eval.json")
    done = yopo("eval", plan, *data, *options)
    assert done.code == 0 and "next: yopo report" in done.err
    examples = json.loads(Path("eval.json").read_text())["examples"]
    assert len(examples) == 3
    for each in examples:
        (look,) = each["looks"]
        for of in ("dense", "pruned"):
            assert len(look[of]) == look["rows"] * look["cols"] and 0 < sum(look[of]) <= 1.001
    assert yopo("report", plan, "--eval", "eval.json").code == 0
    page = Path("report.html").read_text()
    assert PAGE_MARK in page and page.count("different answers;") + page.count("same answer;") == 3
    assert yopo("report", plan).is_sentence  # exists already
    to_stdout = yopo("report", plan, "--eval", "eval.json", "-o", "-")
    assert to_stdout.code == 0 and to_stdout.out.startswith("<!DOCTYPE html>")


def test_results_of_other_kinds_are_refused(yopo: Yopo, calibrated: Path) -> None:
    plan = calibrated / "plan.yaml"
    Path("other.json").write_text("[1]")
    for option in ("--eval", "--bench"):
        found = yopo("report", plan, option, "other.json")
        assert found.is_sentence and "the document is not an object" in found.err
        assert not Path("report.html").exists()


def test_tables_are_ascii_and_narrow_where_they_have_to_be(
    yopo: Yopo, calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = calibrated / "plan.yaml"
    monkeypatch.setenv("COLUMNS", "60")
    usual = yopo("inspect", plan).out
    assert not usual.isascii() and max(map(len, usual.splitlines())) <= 60
    monkeypatch.setenv("LC_ALL", "C")
    plain = yopo("inspect", plan).out
    assert plain.isascii() and "?" not in plain
    assert [len(line) for line in plain.splitlines()] == list(map(len, usual.splitlines()))
    compared = yopo("compare", plan, plan).out
    assert compared.isascii() and max(map(len, compared.splitlines())) <= 60
