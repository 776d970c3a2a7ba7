"""What a session does with its pairs: it judges on none that it fitted on, or does neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from yopo.data.split import MIN_SIDE
from yopo.pipeline import session as tuning
from yopo.pipeline.commands import calibrate
from yopo.pipeline.session import Calibrated, CalibrationSession, FitOptions, RunOptions
from yopo.planning.request import plan_request
from yopo.plans.file import to_yaml
from yopo.support.errors import DataError

MODEL = "llava-tiny"


def options(samples: int, **more: object) -> RunOptions:
    return RunOptions(samples=samples, batch_size=8, max_new_tokens=4, **more)


@pytest.fixture(autouse=True)
def one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One allocation instead of a dozen, and no shapes."""
    monkeypatch.setattr("yopo.planning.planner.RATES", (1.0,))
    monkeypatch.setattr("yopo.planning.planner.PAPER_RADIUS", None)
    monkeypatch.setattr("yopo.planning.planner.FACTOR", 1.0)


def make(samples: int, **wishes: object) -> Calibrated:
    return calibrate(MODEL, plan_request(**wishes), options(samples))


def test_no_pair_is_both_fitted_and_judged_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {"measured": set(), "answered": set(), "encoded": set()}

    def spy(name: str, function, place: int):
        def call(*args: object, **kwargs: object):
            pairs = list(args[place])
            seen[name] |= {pair.where for pair in pairs}
            changed = [*args[:place], pairs, *args[place + 1 :]]
            return function(*changed, **kwargs)

        return call

    monkeypatch.setattr(tuning, "measure", spy("measured", tuning.measure, 2))
    monkeypatch.setattr(tuning, "encode_for", spy("encoded", tuning.encode_for, 2))
    monkeypatch.setattr(tuning, "record_dense", spy("answered", tuning.record_dense, 2))
    fit_options = FitOptions(fit_pairs=8)
    session = CalibrationSession(MODEL, options(40), fit_options, needs_holdout=True)
    assert not seen["answered"]
    made = session.make(plan_request(budget=0.3, compensation="refit"))
    judged = set(seen["answered"])
    session.agreement(made.plan, made.tensors)
    aside = seen["answered"] - judged
    assert (len(seen["measured"]), len(seen["encoded"]), len(judged), len(aside)) == (20, 8, 10, 10)
    assert seen["encoded"] < seen["measured"] and not seen["measured"] & seen["answered"]
    split = {"statistics": 20, "fit": 8, "held_out": 10, "aside": 10}
    assert made.plan.provenance["split"] == split
    assert made.plan.provenance["samples"] == 20
    assert made.candidates[0].kl == session.kl(made.plan, made.tensors) > 1e-5


@pytest.mark.parametrize("samples", [1, 2 * MIN_SIDE - 1])
def test_few_pairs_fit_nothing_and_say_so(samples: int, capsys: pytest.CaptureFixture) -> None:
    made = make(samples, budget=0.2)
    said = capsys.readouterr().err
    pairs = f"{samples} pair{'s' * (samples > 1)}"
    assert f"warning: Only {pairs} to calibrate on" in said and "at least 32" in said
    assert f"warning: {pairs}: too few to hold any out" in said
    assert made.plan.compensation == "none" and not made.tensors.refit
    assert made.plan.provenance["shape"] == "reader-heads"
    assert [each.kl for each in made.candidates] == [None]
    assert made.plan.provenance["split"]["held_out"] == 0
    assert 0.15 < made.plan.budget.reached <= 0.2


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"budget": 0.2, "compensation": "refit"}, "15 pairs: too few to fit visual weights"),
        ({"budget": 0.2, "search": 3}, "15 pairs: too few to search, expected at least 16"),
        ({"tolerance": 0.1}, "too few to set some aside for a tolerance, expected at least 24"),
    ],
)
def test_what_needs_more_pairs_is_refused(wishes: dict, message: str) -> None:
    with pytest.raises(DataError) as caught:
        make(15, **wishes)
    assert message in caught.value.message and "--samples" in caught.value.remedy


def test_a_preset_measures_all_pairs_and_fits_on_enough() -> None:
    made = make(MIN_SIDE, preset="yopo-25", compensation="refit")
    assert made.plan.provenance["split"] == {
        "statistics": MIN_SIDE,
        "fit": MIN_SIDE,
        "held_out": 0,
        "aside": 0,
    }
    with pytest.raises(DataError, match="too few to fit visual weights, expected at least 8"):
        make(MIN_SIDE - 1, preset="yopo-25", compensation="refit")


def test_the_same_seed_gives_the_same_bytes() -> None:
    made = [make(2 * MIN_SIDE, budget=0.3, compensation="refit") for _ in range(2)]
    assert to_yaml(made[0].plan) == to_yaml(made[1].plan)
    assert made[0].tensors.to_bytes() == made[1].tensors.to_bytes()


def test_questions_about_one_image_are_as_good_as_one_pair(
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
    made = calibrate(MODEL, plan_request(budget=0.2), options(40, data=str(data)))
    assert "Only 40 pairs of 1 different image to calibrate on" in capsys.readouterr().err
    assert made.plan.provenance["split"]["held_out"] == 0 and made.plan.compensation == "none"
