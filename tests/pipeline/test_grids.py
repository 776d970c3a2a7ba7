"""Sizes of images in a calibration: what is noted of one size, what --grids changes, who warns."""

from __future__ import annotations

import warnings

import pytest

from yopo.data.sources import open_pairs
from yopo.pipeline.commands import calibrate, evaluate
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.request import PaperRequest
from yopo.plans.extent import Extent
from yopo.plans.grid import Grid
from yopo.support.errors import DataError, YopoWarning

SMALL, LARGE = Grid(4, 4), Grid(8, 8)
NOTE = "larger images have more"
ASKED = PaperRequest(preset="yopo-25")


def rows(count: int, side: int) -> list[dict[str, object]]:
    pairs = open_pairs("demo:glyphs-calibration", samples=count, seed=0)
    return [
        {"image": pair.images[0].load().resize((side, side)), "question": pair.question}
        for pair in pairs
    ]


def options(side: int, count: int = 8) -> RunOptions:
    return RunOptions(data=rows(count, side), max_new_tokens=2)


def test_one_size_is_noted_where_larger_images_have_larger_grids(
    capsys: pytest.CaptureFixture,
) -> None:
    made = calibrate("qwen2-vl-tiny", ASKED, options=options(48))
    assert made.plan.extent == Extent(SMALL, SMALL, 1) == made.statistics.extent
    said = capsys.readouterr().err
    assert "All calibration images have 4 x 4 visual tokens" in said and NOTE in said


@pytest.mark.parametrize(("model", "side"), [("qwen2-vl-tiny", 96), ("llava-tiny", 48)])
def test_no_note_where_none_are_larger(
    model: str, side: int, capsys: pytest.CaptureFixture
) -> None:
    """The one takes no more tokens than these, the other always as many."""
    made = calibrate(model, ASKED, options=options(side))
    assert made.plan.extent == Extent(LARGE, LARGE, 1)
    assert NOTE not in capsys.readouterr().err


def test_grids_are_mixed_and_known_and_a_prompt_beyond_is_warned_of(
    capsys: pytest.CaptureFixture,
) -> None:
    mixed = calibrate(
        "qwen2-vl-tiny", ASKED, options=options(48), fit_options=FitOptions(grids=(1.0, 2.0))
    ).plan
    assert mixed.extent == Extent(SMALL, LARGE, 1) and mixed.provenance["grids"] == [1.0, 2.0]
    assert NOTE not in capsys.readouterr().err
    small = calibrate("qwen2-vl-tiny", ASKED, options=options(48)).plan
    assert "grids" not in small.provenance
    with pytest.warns(YopoWarning, match="8 x 8 visual tokens, where the largest .* 4 x 4"):
        evaluate(small, options=options(96, 2), timing_runs=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", YopoWarning)
        evaluate(mixed, options=options(96, 2), timing_runs=0)
        evaluate(small, options=options(48, 2), timing_runs=0)


def test_impossible_grids_are_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(DataError, match="found 0.0"):
        calibrate("llava-tiny", ASKED, fit_options=FitOptions(grids=(0.0,)))
