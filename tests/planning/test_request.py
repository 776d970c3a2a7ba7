"""Options make requests; contradictory ones and values out of range are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import statistics_maker

from yopo.planning.planner import make_plan
from yopo.planning.request import (
    KNOBS,
    BudgetRequest,
    LatencyRequest,
    PaperRequest,
    PlanRequest,
    ToleranceRequest,
    plan_request,
)
from yopo.plans.schema import ModelShape
from yopo.support.errors import PlanError

KNOB_VALUES = {
    "preset": "yopo-25",
    "head_ratio": 0.5,
    "neuron_ratio": 0.0,
    "visual_layers": 0,
    "radius": 0,
    "alpha": 0.0,
}
"""Of every knob of the paper's shape one, zero where that means something."""

BESIDE = {"compensation": "refit", "bidirectional": True, "kv_groups": True}
"""What every request may say."""

SOLVED = {
    "budget": ({"budget": 0.4}, BudgetRequest(0.4)),
    "milliseconds": (
        {"milliseconds": 30.0, "costs": "costs.json"},
        LatencyRequest(30.0, "costs.json"),
    ),
    "tolerance": ({"tolerance": 0.01}, ToleranceRequest(0.01)),
}
"""Requests that end in a budget, as loose options and as what they are."""


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize("beside", [{}, BESIDE, {"kv_budget": 0.5}], ids=str)
def test_options_make_the_request_that_they_describe(kind: str, beside: dict) -> None:
    options, request = SOLVED[kind]
    unsaid = dict.fromkeys(KNOBS) | {"template": None, "search": None, "kv_groups": False}
    assert plan_request(**unsaid | options | beside) == replace(request, **beside)


def test_a_budget_or_a_time_may_name_a_template_and_a_search() -> None:
    for kind in ("budget", "milliseconds"):
        options, request = SOLVED[kind]
        beside = {"template": "reader", "search": 7}
        assert plan_request(**options, **beside) == replace(request, **beside)


def test_all_other_options_describe_the_papers_shape() -> None:
    assert plan_request() == PaperRequest()
    assert plan_request(bidirectional=True) == PaperRequest(bidirectional=True)
    for name, value in KNOB_VALUES.items():
        assert plan_request(**{name: value}, **BESIDE) == PaperRequest(**{name: value}, **BESIDE)


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize("knob", KNOBS)
def test_an_explicit_shape_excludes_solved_requests(kind: str, knob: str) -> None:
    with pytest.raises(PlanError, match=f"^{kind} and {knob} exclude one another") as caught:
        plan_request(**SOLVED[kind][0], **{knob: KNOB_VALUES[knob]})
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("first", "second"),
    [("tolerance", "budget"), ("tolerance", "milliseconds"), ("milliseconds", "budget")],
)
def test_only_one_quantity_can_be_solved_for(first: str, second: str) -> None:
    with pytest.raises(PlanError, match=f"^{first} and {second} exclude one another"):
        plan_request(**SOLVED[second][0], **SOLVED[first][0])


@pytest.mark.parametrize("beside", [{"template": "reader"}, {"search": 5}], ids=str)
def test_a_tolerance_finds_and_allocates_the_budget_itself(beside: dict) -> None:
    with pytest.raises(PlanError, match="tolerance and .* exclude one another") as caught:
        plan_request(tolerance=0.01, **beside)
    assert caught.value.remedy == "A tolerance already finds the budget and how to spend it."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "reader"}, "template needs a budget"),
        ({"search": 10}, "search needs a budget"),
        ({"preset": "yopo-25", "search": 10}, "search needs a budget"),
        ({"kv_budget": 0.5}, "kv_budget needs a budget, and none is given"),
        ({"preset": "yopo-25", "kv_budget": 0.5}, "kv_budget needs a budget"),
        ({"milliseconds": 30.0}, "milliseconds needs the costs"),
        ({"alpha": 0.1, "head_ratio": 0.5}, "head_ratio and alpha exclude one another"),
        (
            {"budget": 0.2, "compensation": "median"},
            "compensation must be one of none, mean, refit",
        ),
        ({"tolerance": 0.01, "compensation": "mean"}, "compensation must be refit"),
    ],
)
def test_contradictory_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan_request(**options)
    assert "\n\n" not in str(caught.value)


NOT_A_NUMBER = float("nan")
OUT_OF_RANGE = [
    *(
        (BudgetRequest, {"budget": each}, r"budget must lie in \(0, 1\]")
        for each in (-0.5, 0.0, 1.5)
    ),
    (BudgetRequest, {"budget": NOT_A_NUMBER}, r"budget must lie in \(0, 1\], found nan"),
    (BudgetRequest, {"budget": 0.5, "kv_budget": 2}, r"kv_budget must lie in \(0, 1\], found 2"),
    (BudgetRequest, {"budget": 0.5, "kv_budget": 0}, r"kv_budget must lie in \(0, 1\], found 0"),
    *((ToleranceRequest, {"tolerance": each}, r"must lie in \(0, 1\)") for each in (0.0, 1.0)),
    (ToleranceRequest, {"tolerance": 0.1, "kv_budget": 2}, "kv_budget must lie"),
    *(
        (LatencyRequest, {"milliseconds": each, "costs": "c"}, "milliseconds must be positive")
        for each in (0.0, -1.0, NOT_A_NUMBER)
    ),
    (LatencyRequest, {"milliseconds": 1.0, "costs": "c", "kv_budget": 2}, "kv_budget must lie"),
    (PaperRequest, {"preset": "yopo25"}, "Did you mean 'yopo-25'"),
    (PaperRequest, {"head_ratio": 2.0}, r"head_ratio must lie in \[0, 1\]"),
    (PaperRequest, {"neuron_ratio": -0.1}, r"neuron_ratio must lie in \[0, 1\]"),
    (PaperRequest, {"radius": -1}, "radius must be at least 0"),
    (PaperRequest, {"visual_layers": -1}, "visual_layers must be at least 0"),
    (PaperRequest, {"alpha": -0.1}, "alpha must be at least 0"),
    (PaperRequest, {"alpha": NOT_A_NUMBER}, "alpha must be at least 0"),
    (PaperRequest, {"compensation": "median"}, "compensation must be one of none, mean, refit"),
]


@pytest.mark.parametrize(("kind", "values", "message"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(
    kind: type[PlanRequest], values: dict, message: str
) -> None:
    """This holds for requests made directly and from options."""
    for make in (kind, plan_request):
        with pytest.raises(PlanError, match=message) as caught:
            make(**values)
        assert "\n\n" not in str(caught.value)


def test_ranges_include_their_ends() -> None:
    assert BudgetRequest(1.0, kv_budget=1.0).budget == 1.0
    assert PaperRequest(head_ratio=0.0, neuron_ratio=1.0).ratio("neuron_ratio") == 1.0


@pytest.mark.parametrize("kind", ["milliseconds", "tolerance"])
def test_additional_options_carry_over_to_the_solved_budget(kind: str) -> None:
    beside = BESIDE | {"kv_budget": 0.5}
    beside |= {} if kind == "tolerance" else {"template": "reader", "search": 3}
    assert replace(SOLVED[kind][1], **beside).at(0.3) == BudgetRequest(0.3, **beside)


SHAPE = ModelShape(layers=9, hidden=64, heads=8, kv_heads=2, head_dim=8, ffn=96)


def test_a_preset_sets_what_the_options_leave_open() -> None:
    asked = PaperRequest(preset="yopo-12", head_ratio=0.75)
    assert (asked.ratio("head_ratio"), asked.ratio("neuron_ratio")) == (0.75, 0.25)
    assert (asked.num_visual_layers(SHAPE), asked.radius_or_default) == (4, 2)
    own = PaperRequest(preset="yopo-12", visual_layers=9, radius=0)
    assert (own.num_visual_layers(SHAPE), own.radius_or_default) == (9, 0)
    bare = PaperRequest()
    assert (bare.ratio("head_ratio"), bare.ratio("neuron_ratio")) == (1.0, 1.0)
    assert (bare.num_visual_layers(SHAPE), bare.radius_or_default) == (9, None)


def test_query_heads_are_pruned_singly_by_default() -> None:
    assert [BudgetRequest(0.3, kv_groups=each).group(SHAPE) for each in (False, True)] == [1, 4]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (PaperRequest(), {}),
        (PaperRequest(preset="yopo-25", radius=0), {"preset": "yopo-25", "radius": 0}),
        (PaperRequest(alpha=0.0, kv_groups=True), {"alpha": 0.0, "kv_groups": True}),
        (BudgetRequest(0.4), {}),
        (BudgetRequest(0.4, kv_budget=0.5, kv_groups=True), {"kv_budget": 0.5, "kv_groups": True}),
    ],
)
def test_a_plan_records_its_request_without_defaults(
    asked: BudgetRequest | PaperRequest, expected: dict
) -> None:
    plan, _ = make_plan(statistics_maker.make(), asked)
    assert asked.provenance() == expected
    assert {key: plan.provenance.get(key) for key in expected} == expected
    left_out = {*KNOBS, "kv_budget", "kv_groups"} - set(expected)
    assert not left_out & set(plan.provenance)
