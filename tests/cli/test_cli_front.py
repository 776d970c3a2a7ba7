"""Several budgets share one checkpoint, which loads at the requested budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from command_line import Yopo, side_file

import yopo as package
from yopo.plans.storage import read_plan
from yopo.support.errors import CheckpointError

QUICK = ("--model", "llava-tiny", "--samples", 16, "--measure-pairs", 8, "--fit-pairs", 8)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("front")


@pytest.fixture(autouse=True)
def few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.try_few_plans(monkeypatch)


@pytest.fixture
def baked(yopo: Yopo, front: Path) -> Path:
    """Two budgets, calibrated and baked together, once."""
    target = front / "both"
    if not target.exists():
        asked = ("--budgets", "0.1,0.3", "--compensation", "refit", "-o", front / "plan.yaml")
        done = yopo("calibrate", *QUICK, *asked)
        plans = (front / "plan-0.3.yaml", front / "plan-0.1.yaml")
        assert done.code == 0
        assert {*front.iterdir()} == {*plans, *map(side_file, plans)} and len(set(plans)) == 2
        done = yopo("apply", *plans, "-o", target)
        assert done.code == 0 and done.out.strip() == str(target)
    return target


def test_one_checkpoint_serves_every_budget(baked: Path) -> None:
    for budget, asked in ((None, 0.3), (0.3, 0.3), (0.29, 0.1), (0.1, 0.1)):
        model = package.load(baked, budget=budget)
        plan = model.get_decoder().yopo.plan
        assert plan.budget.asked == asked and plan.baked
    with pytest.raises(CheckpointError, match="no plan within a visual budget of 0.05; it has 0.0"):
        package.load(baked, budget=0.05)


def test_each_baked_plan_equals_the_plan_in_memory(yopo: Yopo, front: Path, baked: Path) -> None:
    fast = ("--samples", 8, "--timing-runs", 0, "--max-new-tokens", 4, "--json")
    for name, budget in (("plan-0.1.yaml", 0.1), ("plan-0.3.yaml", 0.3)):
        alone = json.loads(yopo("eval", front / name, *fast).out)
        together = json.loads(yopo("eval", baked, "--budget", budget, *fast).out)
        assert together["visual_budget"] == alone["visual_budget"]
        assert together["same_answers"] == alone["same_answers"]
        assert together["kl"] == pytest.approx(alone["kl"], rel=1e-3, abs=1e-6)


def test_plans_of_different_calibrations_cannot_share_a_checkpoint(
    yopo: Yopo, front: Path, baked: Path
) -> None:
    other = front / "other.yaml"
    if not other.exists():
        asked = ("--head-ratio", 0.5, "--neuron-ratio", 0.5, "--seed", 3, "-o", other)
        assert yopo("calibrate", *QUICK, *asked).code == 0
    done = yopo("apply", front / "plan-0.3.yaml", other, "-o", front / "never")
    assert done.is_sentence and "different neuron orders" in done.err
    assert not (front / "never").exists()


def test_a_tolerance_finds_its_budget(yopo: Yopo, tmp_path: Path) -> None:
    """A loose tolerance prunes something; a plan that meets it records how closely."""
    output = tmp_path / "plan.yaml"
    done = yopo("calibrate", *QUICK, "--samples", 24, "--tolerance", 0.5, "-o", output)
    assert done.code == 0 and "The smallest budget within a tolerance of 50.0% is" in done.err
    plan = read_plan(output)
    found = plan.provenance["tolerance"]
    assert found["asked"] == 0.5 and found["agreement"] >= 0.5 and found["pairs"] == 8
    assert 0 < plan.budget.reached < 0.9


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--tolerance", 0.1, "--budget", 0.2), "tolerance and budget exclude one another"),
        (("--tolerance", 1.5), "tolerance must lie in (0, 1), found 1.5"),
        (("--tolerance", 0.1, "--compensation", "mean"), "compensation must be refit"),
        (("--budgets", "0.1,many"), "expected a share such as 0.25 or 25%, found 'many'"),
        (("--budgets", "0.1,0.2", "-o", "-"), "--budgets writes several plans"),
        (("--tolerance", 0.1, "--samples", 3), "too few to hold some out"),
    ],
)
def test_invalid_budget_combinations_are_refused(yopo: Yopo, flags: tuple, sentence: str) -> None:
    done = yopo("calibrate", "--model", "llava-tiny", *flags)
    assert done.code in (1, 2) and sentence in " ".join(done.err.split())


def test_milliseconds_become_a_budget_by_a_benchmark_of_the_same_shape(
    yopo: Yopo, tmp_path: Path
) -> None:
    plan, costs = tmp_path / "plan.yaml", tmp_path / "costs.json"
    done = yopo("calibrate", *QUICK, "--preset", "yopo-25", "-o", plan)
    timed = yopo("bench", plan, "--random-weights", "--runs", 3, "--decode-steps", 0, "--json")
    assert done.code == timed.code == 0
    document = json.loads(timed.out)  # times measured on tiny models may be in any order
    for side, milliseconds in (("dense", 9.0), ("pruned", 4.0)):
        document["prefill_ms"][side]["median"] = milliseconds
    costs.write_text(json.dumps(document))
    asked = (
        "--milliseconds",
        1e6,
        "--costs",
        costs,
        "--compensation",
        "none",
        "--template",
        "thin",
    )
    done = yopo("calibrate", *QUICK, *asked, "-o", tmp_path / "slow.yaml")
    assert done.code == 0 and "1e+06 ms correspond to a visual budget of 100.0%" in done.err
    done = yopo(
        "calibrate", *QUICK, "--milliseconds", 1e-6, "--costs", costs, "--force", "-o", plan
    )
    assert done.is_sentence and "out of reach" in done.err
    done = yopo("calibrate", *QUICK, "--milliseconds", 5)
    assert done.code == 2 and "--milliseconds and --costs need each other" in done.err


def test_a_budget_selects_only_among_the_checkpoints_plans(yopo: Yopo, front: Path, baked) -> None:
    done = yopo("eval", front / "plan-0.1.yaml", "--budget", 0.1)
    assert done.is_sentence and "is one plan" in done.err


def test_a_kv_budget_can_be_combined_with_a_budget(
    yopo: Yopo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yopo.planning.allocate.KV_STEPS", 6)
    plan = tmp_path / "plan.yaml"
    done = yopo("calibrate", *QUICK, "--budget", 0.3, "--kv-budget", 0.4, "-o", plan)
    assert done.code == 0
    kept = json.loads(yopo("inspect", "--json", plan).out)["visual_kv_bytes"]["ratio"]
    assert 0.2 < kept <= 0.4
    asked = ("--preset", "yopo-25", "--kv-budget", 0.4)
    done = yopo("calibrate", *QUICK, *asked, "-o", tmp_path / "none.yaml")
    assert done.code == 1 and "kv_budget needs a budget" in done.err
    asked = ("--samples", 24, "--tolerance", 1e-6, "--kv-budget", 0.01)
    done = yopo("calibrate", *QUICK, *asked, "-o", tmp_path / "none.yaml")
    assert done.code == 1 and "No plan within a KV budget of 0.01 agrees" in done.err
