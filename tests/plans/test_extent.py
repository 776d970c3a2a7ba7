"""The grids of a calibration: their range, what lies beyond, how plans carry it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from yopo.plans.extent import Extent
from yopo.plans.file import parse_plan, to_yaml
from yopo.plans.grid import Grid
from yopo.plans.schema import InvalidPlan, ModelIdentity, ModelShape, Workload, full_plan
from yopo.support.errors import PlanError

SHAPE = ModelShape(2, 16, 2, 2, 8, 32)
PLAN = full_plan(ModelIdentity("m", "llava", SHAPE, "ab" * 32), Workload((Grid(4, 6),), 8, 2))
EXTENT = Extent(Grid(4, 6), Grid(10, 8), 2)


def test_the_range_of_prompts() -> None:
    prompts = [(Grid(8, 8),), (Grid(4, 6), Grid(10, 8)), (Grid(8, 10),)]
    assert Extent.of(prompts) == EXTENT
    assert Extent.of([(Grid(3, 3),) * 5]).merge(EXTENT) == Extent(Grid(3, 3), Grid(10, 8), 5)


@pytest.mark.parametrize(
    ("grids", "found"),
    [
        ((), None),
        ((Grid(1, 1),), None),
        ((Grid(8, 11),), None),  # 88 tokens: a tenth more
        ((Grid(4, 6), Grid(9, 10)), "9 x 10 visual tokens"),
        ((Grid(4, 6),) * 4, None),
        ((Grid(4, 6),) * 5, "5 images, where the calibration had at most 2"),
    ],
)
def test_what_lies_beyond(grids: tuple[Grid, ...], found: str | None) -> None:
    problem = EXTENT.exceeded_by(grids)
    assert (problem is None) if found is None else found in problem


def test_a_plan_carries_it_through_its_file() -> None:
    text = to_yaml(replace(PLAN, extent=EXTENT))
    assert "calibrated:" in text
    assert parse_plan("plan.yaml", text)[0].extent == EXTENT
    assert to_yaml(parse_plan("plan.yaml", text)[0]) == text


def test_former_plans_have_none_and_their_bytes_stay() -> None:
    text = to_yaml(PLAN)
    assert "calibrated" not in text
    assert parse_plan("plan.yaml", text)[0].extent is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("calibrated: 3", "must be a mapping"),
        ("calibrated: {smallest: [4, 4], largest: [8, 8]}", "images"),
        ("calibrated: {smallest: [4], largest: [8, 8], images: 1}", r"must be \[rows, columns\]"),
        ("calibrated: {smallest: [9, 9], largest: [8, 8], images: 1}", "no more tokens"),
        ("calibrated: {smallest: [0, 9], largest: [8, 8], images: 1}", "positive sizes"),
        ("calibrated: {smallest: [4, 4], largest: [8, 8], images: 1, more: 1}", "not a known key"),
    ],
)
def test_a_wrong_one_is_a_sentence(line: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan("plan.yaml", f"{to_yaml(PLAN)}{line}\n")


def test_a_wrong_one_in_memory_is_refused() -> None:
    with pytest.raises(InvalidPlan, match="positive sizes"):
        replace(PLAN, extent=Extent(Grid(4, 6), Grid(10, 8), 0))
