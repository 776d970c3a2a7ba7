"""Milliseconds become a budget on a line through measured points; others are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from yopo.bench.costs import Costs, read_costs
from yopo.plans.flops import dense_prefill_flops
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, Workload
from yopo.support.errors import DataError, PlanError

SHAPE = ModelShape(8, 128, 8, 8, 16, 352)
PROMPT = Workload((Grid(8, 8),), 20, 3)
SLOPE, FIXED = 2e-8, 0.25


def benchmark(path: Path, *, layers: int = 4, batch: int = 2, **changes: object) -> Path:
    """Write what `yopo bench --json` prints on a machine with a price per FLOP and per layer."""
    work = {"dense": 4e9, "pruned": 1e9}
    times = {name: {"median": SLOPE * each + FIXED * layers * batch} for name, each in work.items()}
    shape = asdict(replace(SHAPE, layers=layers))
    found = {
        "prefill_ms": times,
        "prefill_flops": work,
        "shape": shape,
        "prompt": {"batch": batch},
    }
    path.write_text(json.dumps(found | changes))
    return path


def test_the_fitted_line_is_the_given_one(tmp_path: Path) -> None:
    costs = read_costs(benchmark(tmp_path / "costs.json"), SHAPE)
    assert costs.slope == pytest.approx(SLOPE) and costs.fixed == pytest.approx(FIXED)


def test_milliseconds_become_the_budget_on_the_line() -> None:
    costs = Costs(FIXED, SLOPE)
    text = dense_prefill_flops(SHAPE, replace(PROMPT, grids=(), text_before=0))
    dense = dense_prefill_flops(SHAPE, PROMPT)
    for budget in (0.1, 0.5, 1.0):
        milliseconds = FIXED * 8 + SLOPE * (text + budget * (dense - text))
        assert costs.budget(milliseconds, SHAPE, PROMPT) == pytest.approx(budget)
    assert costs.budget(1e6, SHAPE, PROMPT) == 1.0
    with pytest.raises(PlanError, match="its text alone takes"):
        costs.budget(FIXED * 8, SHAPE, PROMPT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill_ms": None}, "is not an output of `yopo bench --json`"),
        ({"shape": asdict(replace(SHAPE, hidden=64))}, "measured at hidden 64, the model's is 128"),
        (
            {"prefill_ms": {"dense": {"median": 1.0}, "pruned": {"median": 2.0}}},
            "pruned took as long as dense",
        ),
    ],
)
def test_an_invalid_cost_table_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_costs(benchmark(tmp_path / "costs.json", **changes), SHAPE)
    with pytest.raises(DataError, match="is not an output"):
        read_costs(tmp_path / "nothing.json", SHAPE)
