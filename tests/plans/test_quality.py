"""A plan's quality is read from its provenance, if it still is of that plan."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from yopo.plans.evaluated import Evaluated, evaluated_of, with_evaluation
from yopo.plans.quality import Quality, marks, quality_of
from yopo.plans.schema import PruningPlan
from yopo.support.errors import PlanError

ENTRY = {
    **{"pairs": 12, "kl": 0.02, "whole_answers": 0.75, "agreement": 0.9},
    "kinds": {
        "color": {"pairs": 8, "kl": 0.01, "whole_answers": 1.0},
        "count": {"pairs": 4, "kl": 0.04, "whole_answers": 0.25},
    },
}


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    identity = tiny.make_subject("mha").identity
    return tiny.random_plan(identity, random.Random(1), compensation="none", baked=False)


def with_entry(plan: PruningPlan, **changes: Any) -> PruningPlan:
    return replace(plan, provenance={"quality": {**ENTRY, "of": marks(plan), **changes}})


def test_the_quality_is_read(plan: PruningPlan) -> None:
    found = quality_of(with_entry(plan))
    assert found is not None and found.is_current
    assert (found.pairs, found.kl, found.whole_answers, found.agreement) == (12, 0.02, 0.75, 0.9)
    assert found.worst_kind == "count" and found.kinds["count"].kl == 0.04
    assert found.to_dict()["kinds"]["color"]["whole_answers"] == 1.0
    assert quality_of(plan) is None


def test_an_edited_plan_is_not_what_was_measured(plan: PruningPlan) -> None:
    measured = with_entry(plan)
    first = replace(plan.layers[0], neurons=plan.layers[0].neurons // 2 + 1)
    edited = measured.with_layers([first, *plan.layers[1:]])
    found = quality_of(edited)
    assert found is not None and not found.is_current
    changed = [quality_of(replace(measured, compensation="mean")), quality_of(measured)]
    assert [each.is_current for each in changed if each is not None] == [False, True]


def test_former_plans_say_what_their_best_candidate_did(plan: PruningPlan) -> None:
    best = {"template": "light", "kl": 0.5, "whole_answers": 0.4}
    former = {"candidates": [best], "split": {"comparison": 9}}
    found = quality_of(replace(plan, provenance=former))
    assert found == Quality(9, 0.5, 0.4, agreement=None, kinds={})
    assert found.worst_kind is None
    best["kl"] = None
    assert quality_of(replace(plan, provenance=former)) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"kl": None},
        {"pairs": "many"},
        {"kinds": [1]},
        {"kinds": {"a": 3}},
        {"whole_answers": {}},
        {"agreement": []},
    ],
)
def test_a_misshapen_quality_counts_as_none(plan: PruningPlan, damage: dict[str, Any]) -> None:
    assert quality_of(with_entry(plan, **damage)) is None


def document(plan: PruningPlan, **changes: Any) -> dict[str, Any]:
    """What ``yopo eval --json`` prints, as far as it is read."""
    return {
        **{"model": plan.model.name, "visual_budget": plan.budget.reached},
        **{"pairs": 20, "kl": 0.123456, "same_answers": 15},
        "accuracy": {"dense": 10, "pruned": 9, "total": 18},
        **changes,
    }


def test_an_evaluation_is_recorded(plan: PruningPlan, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(document(plan)))
    found = with_evaluation(plan, path)
    expected = Evaluated(20, 0.1235, 15, dense=10, pruned=9, answered=18)
    assert evaluated_of(found) == expected and evaluated_of(plan) is None
    path.write_text(json.dumps(document(plan, accuracy=None)))
    assert evaluated_of(with_evaluation(plan, path)) == Evaluated(20, 0.1235, 15)
    assert evaluated_of(replace(found, compensation="mean")) is None, "edited since"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"visual_budget": 0.9}, "evaluates a plan for tiny-mha at 90.00% of the visual FLOPs"),
        ({"model": "another"}, "evaluates a plan for another"),
        ({"pairs": None}, "holds no evaluation of a plan"),
        ({"accuracy": {"dense": 1}}, "holds no evaluation of a plan"),
    ],
)
def test_another_plans_evaluation_is_refused(
    plan: PruningPlan, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(document(plan, **changes)))
    with pytest.raises(PlanError, match=sentence):
        with_evaluation(plan, path)


def test_what_is_no_evaluation_is_refused(plan: PruningPlan, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    for content in ("", "[]", "3", "{", "[" * 100_000, '{"accuracy": null}'):
        path.write_text(content)
        with pytest.raises(PlanError, match="holds no evaluation"):
            with_evaluation(plan, path)
    with pytest.raises(PlanError, match="no such file"):
        with_evaluation(plan, tmp_path / "gone.json")
