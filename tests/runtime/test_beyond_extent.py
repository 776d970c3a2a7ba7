"""Prompts well beyond a plan's calibration: one warning per model, none within it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import tiny
from tiny import PICTURE, Subject

from yopo.plans.extent import Extent
from yopo.plans.grid import Grid
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned
from yopo.support.errors import YopoWarning

ROWS = [[1, 5, 6, *PICTURE, 7, 8]]


def prompts(subject: Subject, plan: PruningPlan, rows: list[list[int]]) -> list[str]:
    """What is said of two prompts of such rows."""
    with warnings.catch_warnings(record=True) as found, pruned(subject.model, plan):
        warnings.simplefilter("always")
        for _ in range(2):
            tiny.logits(subject.model, tiny.batch(rows))
    return [str(each.message) for each in found if each.category is YopoWarning]


def extent(side: int, images: int = 1) -> Extent:
    return Extent(Grid(1, 1), Grid(side, side), images)


def test_larger_images_are_warned_of_once_per_model() -> None:
    subject = tiny.make_subject("mha")
    plan = replace(subject.random_plan(3), extent=extent(2))
    said = prompts(subject, plan, ROWS)
    assert len(said) == 1 and "4 x 4 visual tokens" in said[0] and "had 2 x 2" in said[0]
    assert not prompts(subject, plan, ROWS)  # not again, when it is installed again
    assert prompts(subject, replace(plan, extent=extent(3)), ROWS)  # another plan


@pytest.mark.parametrize("known", [None, extent(4), extent(9)])
def test_nothing_is_said_within_the_extent(known: Extent | None) -> None:
    subject = tiny.make_subject("mha")
    assert not prompts(subject, replace(subject.random_plan(3), extent=known), ROWS)


def test_many_more_images_are_warned_of() -> None:
    subject = tiny.make_subject("mha")
    plan = replace(subject.random_plan(3), extent=extent(4))
    two, three = ([[1, *PICTURE * count, 7, 8]] for count in (2, 3))
    assert not prompts(subject, plan, two)
    said = prompts(subject, plan, three)
    assert len(said) == 1 and "3 images, where the calibration had at most 1" in said[0]
