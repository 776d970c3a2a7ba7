"""A session never compares plans on pairs that it fitted on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from yopo.data.split import MIN_SIDE
from yopo.evaluation.fidelity import Fidelity, kinds_of_records
from yopo.pipeline import judge
from yopo.pipeline import session as module
from yopo.pipeline.commands import calibrate
from yopo.pipeline.session import Calibrated, CalibrationSession, FitOptions, RunOptions
from yopo.pipeline.tolerance import MAX_HOLDOUT, Agreement
from yopo.planning.request import BudgetRequest, PaperRequest, PlanRequest, ToleranceRequest
from yopo.plans.schema import PruningPlan
from yopo.plans.storage import plan_files
from yopo.support.errors import DataError

MODEL = "llava-tiny"


def options(samples: int, **more: object) -> RunOptions:
    return RunOptions(samples=samples, batch_size=8, max_new_tokens=4, **more)


@pytest.fixture(autouse=True)
def one_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One allocation instead of a dozen."""
    tiny.try_few_plans(monkeypatch)


def make(samples: int, request: PlanRequest) -> Calibrated:
    return calibrate(MODEL, request, options=options(samples))


def test_no_pair_is_both_fitted_and_judged_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {"measured": set(), "answered": set(), "encoded": set()}

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: object, processor: object, pairs: Any, *rest: Any, **more: Any) -> Any:
            pairs = list(pairs)
            seen[name] |= {pair.where for pair in pairs}
            return function(model, processor, pairs, *rest, **more)

        return call

    monkeypatch.setattr(module, "measure", spy("measured", module.measure))
    monkeypatch.setattr(module, "encoded", spy("encoded", module.encoded))
    monkeypatch.setattr(judge, "record_dense", spy("answered", judge.record_dense))
    session = CalibrationSession(MODEL, options(40), FitOptions(fit_pairs=8), holdout=MAX_HOLDOUT)
    assert not seen["answered"]
    made = session.make(BudgetRequest(0.3, compensation="refit"))
    judged = set(seen["answered"])
    session.agreement(made.plan)
    holdout = seen["answered"] - judged
    sizes = (len(seen["measured"]), len(seen["encoded"]), len(judged), len(holdout))
    assert sizes == (20, 8, 10, 10)
    assert seen["encoded"] < seen["measured"] and not seen["measured"] & seen["answered"]
    split = {"statistics": 20, "fit": 8, "comparison": 10, "holdout": 10}
    assert made.plan.provenance["split"] == split
    assert made.plan.provenance["samples"] == 20 == len(session.statistics.rho)
    assert made.candidates[0].kl == session.kl(made.plan) > 1e-5


@pytest.fixture(scope="module")
def session() -> CalibrationSession:
    """A session with a holdout, on as few pairs as possible."""
    fit_options = FitOptions(fit_pairs=8)
    return CalibrationSession(MODEL, options(3 * MIN_SIDE), fit_options, holdout=MAX_HOLDOUT)


@pytest.mark.parametrize("tolerance", [0.01, 0.02])
def test_a_tolerance_is_met_and_used_up(
    session: CalibrationSession, monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> None:
    """Smaller budgets are made to disagree more: 0.004 over the budget."""

    def agreement(plan: PruningPlan, measure: str) -> Agreement:
        assert measure == "tokens"
        return Agreement(round(10**6 * (1 - 0.004 / plan.budget.reached)), 10**6)

    monkeypatch.setattr(session, "agreement", agreement)
    made = session.make(ToleranceRequest(tolerance))
    least = 0.004 / tolerance
    assert least <= made.plan.budget.reached < 1.25 * least
    said = made.plan.provenance["tolerance"]
    assert said["agreement"] == pytest.approx(1 - 0.004 / made.plan.budget.reached, abs=1e-6)
    assert (said["asked"], said["on"], said["pairs"]) == (tolerance, "tokens", MIN_SIDE)
    assert said["trials"] == 10**6 and 0 < said["error_bound"] - (1 - said["agreement"]) < 1e-3
    assert made.plan.compensation == "refit" and made.plan.tensors.refit


def test_a_plan_within_a_tolerance_agrees_within_it(
    session: CalibrationSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the holdout decides, not the pairs that plans are compared on."""
    tolerance = 0.02
    compared: list[tuple[PruningPlan, Fidelity]] = []
    usual = session.judge.compare

    def compare(plan: PruningPlan, pairs: str) -> Fidelity:
        found = usual(plan, pairs)
        if pairs == "holdout":
            compared.append((plan, found))
        return found

    monkeypatch.setattr(session.judge, "compare", compare)
    made = session.make(ToleranceRequest(tolerance))
    about = made.plan.provenance["tolerance"]
    within = [each for each, found in compared if 1 - found.agreement <= tolerance]
    assert 3 <= len(compared)
    best = min([1.0, *(each.budget.reached for each in within)])
    assert made.plan.budget.reached == best
    assert usual(made.plan, "holdout").agreement >= 1 - tolerance
    assert about["error_bound"] > tolerance  # so few tokens prove no more
    assert about["agreement"] >= 1 - tolerance


def test_whole_answers_as_the_measure_and_what_few_of_them_prove(
    session: CalibrationSession, capsys: pytest.CaptureFixture
) -> None:
    made = session.make(ToleranceRequest(0.35, tolerance_on="answers"))
    said = made.plan.provenance["tolerance"]
    assert said["on"] == "answers" and said["trials"] == said["pairs"] == MIN_SIDE
    whole = round(said["agreement"] * MIN_SIDE)
    assert whole >= 0.65 * MIN_SIDE
    assert session.agreement(made.plan, "answers") == Agreement(whole, MIN_SIDE)
    errors = capsys.readouterr().err
    assert "cannot support" not in errors
    session.make(ToleranceRequest(0.2, tolerance_on="answers"))
    errors = capsys.readouterr().err
    assert "warning: 8 holdout answers cannot support a tolerance of 20.00%" in errors
    assert "the error may still be 31.2%" in errors
    assert "It takes 14 holdout pairs, a quarter of 56" in errors


def test_candidates_say_what_their_mean_hides(session: CalibrationSession) -> None:
    made = session.make(BudgetRequest(0.1))
    table = made.plan.provenance["candidates"]
    assert len(table) == len(made.candidates) > 5
    kinds = kinds_of_records(session.comparison)
    best = session.judge.compare(made.plan, "comparison")  # the one that keeps its weights
    assert table[0]["whole_answers"] == best.whole_answers / MIN_SIDE
    for entry, candidate in zip(table, made.candidates, strict=True):
        found = session._judged[candidate.plan.layers, candidate.compensation]
        assert found.kl == candidate.kl
        parts = found.split(kinds)
        assert entry["whole_answers"] == found.whole_answers / MIN_SIDE
        assert entry["worst_kl"] == pytest.approx(parts[entry["worst_kind"]].kl, rel=1e-3)
        assert entry["worst_kl"] == pytest.approx(max(each.kl for each in parts.values()), rel=1e-3)
        assert entry["worst_kl"] >= entry["kl"] * (1 - 1e-3)


@pytest.mark.parametrize("samples", [1, 2 * MIN_SIDE - 1])
def test_too_few_pairs_fit_nothing_and_cause_a_warning(
    samples: int, capsys: pytest.CaptureFixture
) -> None:
    made = make(samples, BudgetRequest(0.2))
    said = capsys.readouterr().err
    pairs = f"{samples} pair{'s' * (samples > 1)}"
    assert f"warning: Only {pairs} to calibrate on" in said and "at least 32" in said
    assert f"warning: {pairs}: too few to hold any out" in said
    assert made.plan.compensation == "none" and not made.plan.tensors.refit
    assert made.plan.provenance["template"] == "reader-heads"
    assert [each.kl for each in made.candidates] == [None]
    assert made.plan.provenance["split"]["comparison"] == 0
    assert 0.15 < made.plan.budget.reached <= 0.2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (BudgetRequest(0.2, compensation="refit"), "15 pairs: too few to fit visual weights"),
        (BudgetRequest(0.2, search=3), "15 pairs: too few to search, expected at least 16"),
        (ToleranceRequest(0.1), "too few to hold some out for a tolerance, expected at least 24"),
    ],
)
def test_requests_that_need_more_pairs_are_refused(asked: PlanRequest, message: str) -> None:
    with pytest.raises(DataError) as caught:
        make(15, asked)
    assert message in caught.value.message and "--samples" in caught.value.remedy


def test_a_preset_measures_all_pairs_and_fits_on_enough() -> None:
    asked = PaperRequest(preset="yopo-25", compensation="refit")
    split = {"statistics": MIN_SIDE, "fit": MIN_SIDE, "comparison": 0, "holdout": 0}
    assert make(MIN_SIDE, asked).plan.provenance["split"] == split
    with pytest.raises(DataError, match="too few to fit visual weights, expected at least 8"):
        make(MIN_SIDE - 1, asked)


def test_the_same_seed_gives_the_same_bytes() -> None:
    asked = BudgetRequest(0.3, compensation="refit")
    first, again = (
        plan_files(make(2 * MIN_SIDE, asked).plan, "plan.yaml", "plan.safetensors")
        for _ in range(2)
    )
    assert len(first) == 2 and first == again


def test_many_questions_about_one_image_count_as_one_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("a.png", "copy.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    rows = [
        {"image": name, "question": f"what is number {number}?"}
        for number in range(20)
        for name in ("a.png", "copy.png")
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    made = calibrate(MODEL, BudgetRequest(0.2), options=options(40, data=str(data)))
    assert "Only 40 pairs of 1 different image to calibrate on" in capsys.readouterr().err
    assert made.plan.provenance["split"]["comparison"] == 0 and made.plan.compensation == "none"
