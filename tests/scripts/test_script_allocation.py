"""Predictions vanish where nothing is pruned, and the study measures what it reports."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.session import CalibrationSession
from yopo.planning.request import BudgetRequest
from yopo.plans.schema import full_plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def allocation() -> ModuleType:
    path = ROOT / "scripts" / "allocation.py"
    spec = importlib.util.spec_from_file_location("allocation", path)
    module = sys.modules["allocation"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_what_is_pruned_is_predicted_to_diverge(allocation: ModuleType) -> None:
    session = CalibrationSession("qwen2-vl-tiny", RunOptions(samples=32), FitOptions())
    predictor = allocation.Predictor(session, session.comparison)
    statistics = session.statistics
    nothing = predictor.predict(full_plan(statistics.model, statistics.workload))
    pruned = session.make(BudgetRequest(0.12, template="reader", compensation="none")).plan
    something = predictor.predict(pruned)
    assert nothing.keys() == something.keys()
    for name, value in something.items():
        assert nothing[name] < 1e-6 * value, name


def test_a_ranking_is_recorded_and_reported(
    allocation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "allocation.jsonl"
    options = Namespace(
        model="qwen2-vl-tiny", samples=32, pairs=4, plans=3, budgets=[0.12], seed=0, output=path
    )
    allocation.ranking(options)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3 and len({row["held"] for row in rows}) == 3
    for row in rows:
        assert row["held"] > 0 and min(row["predicted"].values()) > 0
    allocation.report(options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | qwen2-vl-tiny, 12% |"
    assert len(lines) == 2 + len(rows[0]["predicted"]) + 1


def test_rank_correlations(allocation: ModuleType) -> None:
    assert allocation.spearman([1.0, 2.0, 9.0], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert allocation.spearman([1.0, 2.0, 9.0], [3.0, 2.0, -7.0]) == pytest.approx(-1)
    assert allocation.spearman([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(0.8)
