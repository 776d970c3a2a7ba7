"""Plans side by side: totals, kinds, and the layers in which they differ."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType
from test_report import make_plan

from yopo.plans.flops import visual_budget, visual_kv_bytes
from yopo.plans.quality import marks
from yopo.plans.schema import PruningPlan
from yopo.report.compare import check_comparable, comparison_document, comparison_report
from yopo.report.json import plan_document
from yopo.report.quality import quality_report
from yopo.support.errors import PlanError

KINDS = {
    "color": {"pairs": 8, "kl": 0.011, "whole_answers": 1.0},
    "count": {"pairs": 4, "kl": 0.042, "whole_answers": 0.25},
}


def measured(plan: PruningPlan, kl: float, **about: Any) -> PruningPlan:
    entry = {"pairs": 12, "kl": kl, "whole_answers": 0.75, "agreement": 0.9, "kinds": KINDS}
    entry["of"] = marks(plan)
    return replace(plan, provenance={"template": "light", "quality": entry, **about})


def text_of(renderable: RenderableType, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, highlight=False)
    console.print(renderable)
    return console.file.getvalue()


def plans() -> list[tuple[str, PruningPlan]]:
    """One that was measured, and one of fewer neurons in its second layer that was not."""
    one = make_plan()
    second = replace(one.layers[1], neurons=44)
    two = one.with_layers([one.layers[0], second, *one.layers[2:]])
    return [("one.yaml", measured(one, 0.0234)), ("two.yaml", two)]


def test_totals_kinds_and_differing_layers_are_shown() -> None:
    named = plans()
    said = text_of(comparison_report(named))
    rows = {line[:26].strip(): line[26:].split() for line in said.splitlines()}
    budgets = [f"{100 * visual_budget(plan):.1f}" for _, plan in named]
    assert rows["visual FLOPs"] == [budgets[0], "%", budgets[1], "%"]
    assert rows["logit KL"] == ["0.0234", "-"] and rows["on pairs"] == ["12", "-"]
    assert "count" in said and "0.042" in said
    assert "layers: 7 of 8 are the same in all" in said
    (layer,) = [line.split() for line in said.splitlines() if line.startswith("1 ")]
    assert layer == ["1", "4/4", "r2", "88n", "4/4", "r2", "44n"]
    assert "not measured, or edited since" in said and "different pairs" not in said


def test_other_heads_of_the_same_number_are_marked() -> None:
    one = make_plan()
    heads = tuple(range(1, 8, 2))
    first = replace(one.layers[1], read_heads=heads, attend_heads=heads)
    other = one.with_layers([one.layers[0], first, *one.layers[2:]])
    said = text_of(comparison_report([("a", one), ("b", other)]))
    assert "4/4 r2 88n*" in said and "*: as many heads as in A, but others" in said
    assert comparison_document([("a", one), ("b", other)])["different_layers"] == [1]
    baked = replace(other, baked=True)  # whose heads are renumbered
    assert "layers: 8 of 8" in text_of(comparison_report([("a", one), ("b", baked)]))


def test_what_cannot_be_compared_is_said() -> None:
    (name, one), (_, two) = plans()
    for other in (measured(two, 0.5, seed=1), measured(two, 0.5, pairs="other.jsonl")):
        said = text_of(comparison_report([(name, one), ("b", other)]))
        assert "KL: measured on different pairs" in said
    with pytest.raises(PlanError) as caught:
        check_comparable([(name, one), ("b", make_plan(layers=4))])
    assert caught.value.message.startswith("b: is for llava-tiny, whose decoder differs")


def test_the_document_holds_everything() -> None:
    named = plans()
    found = comparison_document(named)
    first, second = found["plans"]
    assert found["different_layers"] == [1]
    assert first["visual_budget"] == visual_budget(named[0][1])
    assert second["visual_kv_bytes"] == visual_kv_bytes(named[1][1])
    assert first["quality"]["kinds"]["count"]["kl"] == 0.042 and second["quality"] is None
    assert [layer["neurons"] for layer in second["layers"]][:3] == [352, 44, 0]
    assert all(0 <= layer["visual_flops_ratio"] <= 1 for layer in first["layers"])


def test_a_report_fits_a_narrow_console() -> None:
    for width in (60, 80, 120):
        said = text_of(comparison_report(plans()), width)
        assert max(map(len, said.splitlines())) <= width


def test_inspect_shows_what_was_measured_by_kind() -> None:
    plan = measured(make_plan(), 0.0234)
    said = text_of(quality_report(plan))
    assert "all pairs" in said and "0.0234" in said and "75.0 %" in said
    (worst,) = [line.split() for line in said.splitlines() if line.startswith("> count")]
    assert worst == [">", "count", "4", "0.042", "25.0", "%"]
    assert "chosen on these pairs" in said
    assert plan_document(plan)["quality"]["kl"] == 0.0234
    assert "quality: not measured" in text_of(quality_report(make_plan()))
    edited = replace(plan, compensation="mean")
    assert "before the plan was edited" in text_of(quality_report(edited))
