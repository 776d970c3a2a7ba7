"""The report's page: well formed, self-contained, escaped, with the plan's own numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_compare import measured
from test_report import make_plan

from yopo.plans.flops import (
    prefill_flops,
    visual_budget,
    visual_flops_of_layer,
    visual_parts_of_layer,
)
from yopo.plans.schema import PruningPlan
from yopo.report import units
from yopo.report.page.page import report_page
from yopo.report.page.results import read_evaluation
from yopo.report.page.svg import Scale
from yopo.support.errors import PlanError

EVIL = "<script>alert(1)</script>\"'&\u202e\x00"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9Q"
    "DwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "input"}


class Checker(HTMLParser):
    """Checks that elements are closed in order; collects tags, attributes and text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.said = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def document(plan: PruningPlan, **other: Any) -> dict[str, Any]:
    part = {"pairs": 12, "kl": 0.5, "agreement": 0.9, "same_answers": 11}
    part |= {"accuracy": {"dense": 10, "pruned": 9, "total": 12}}
    look = {"picture": PIXEL, "rows": 1, "cols": 2, "dense": [0.1, 0.5], "pruned": [0.2, 0.3]}
    example = {
        **{"question": EVIL, "accepted": [EVIL], "kind": EVIL, "dense": EVIL, "pruned": EVIL},
        **{"is_same": False, "kl": 0.1, "images": [PIXEL], "num_images": 1, "looks": [look]},
    }
    whole = {"model": plan.model.name, "visual_budget": visual_budget(plan), **part}
    return {
        "yopo_evaluation": 1,
        **whole,
        **{"by_kind": {EVIL: part, "count": part}, "worst_kind": "count", "prefill": None},
        **{"examples": [example], **other},
    }


def page_of(plan: PruningPlan, tmp_path: Path, **other: Any) -> str:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(document(plan, **other)))
    return report_page([("plan.yaml", plan)], evaluations=[("e", read_evaluation(path))])


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    plan = measured(make_plan(), 0.02)
    for page in (report_page([("plan.yaml", plan)]), page_of(plan, tmp_path)):
        found = Checker(page)
        assert found.open == [] and page.startswith("<!DOCTYPE html>")
        for name, value in found.attributes:
            assert name not in ("style", "onload", "onclick", "action")
            if name in ("src", "href"):
                assert value.startswith("data:image/")
        assert "http:" not in page and "https:" not in page and "@import" not in page
        assert "default-src &#39;none&#39;; img-src data:;" in page


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    plan = measured(make_plan(), 0.02, pairs=EVIL, **{EVIL: {EVIL: [EVIL]}})
    plan = replace(plan, model=replace(plan.model, name=EVIL))
    page = page_of(plan, tmp_path)
    found = Checker(page)
    assert found.tags.count("script") == 1 and "alert(1)" in found.said
    assert "\u202e" not in page and "\x00" not in page


def test_the_numbers_are_those_of_the_plan(tmp_path: Path) -> None:
    plan = measured(make_plan(), 0.0234)
    said = Checker(page_of(plan, tmp_path)).said
    assert "gives 9 of 12 right answers, where the dense model gives 10" in said
    assert units.share(visual_budget(plan)) in said and units.flops(prefill_flops(plan)) in said
    assert "logit KL 0.0234" in said
    shape, workload = plan.model.shape, plan.workload
    for layer in plan.layers:
        parts = visual_parts_of_layer(layer, shape, workload)
        assert parts.total == visual_flops_of_layer(layer, shape, workload)
    assert plan.measured is not None
    assert f"layer 0, head 0: rho {plan.measured.rho[0][0]:.3g}" in said


def test_what_is_not_known_is_left_out_with_a_sentence() -> None:
    plan = replace(make_plan(), measured=None)
    said = Checker(report_page([("plan.yaml", plan)])).said
    assert "what it loses has not been measured" in said
    for sentence in ("No KL was measured", "holds no measurements", "No evaluation of this plan"):
        assert sentence in said
    assert "No examples were given" in said and "No benchmark was given" in said


def test_several_plans_share_a_slider() -> None:
    one = make_plan()
    two = one.with_layers([replace(each, neurons=0) for each in one.layers])
    page = report_page([("a", one), ("b", two)], chosen=0)
    assert page.count("<article") == 2 and 'type="range"' in page
    assert len(re.findall(r"<article[^>]* hidden>", page)) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kl": float("nan")}, "'kl' is not a finite number"),
        ({"pairs": -1}, "'pairs' is not a count"),
        ({"by_kind": []}, "'by_kind' is not an object"),
        ({"examples": [{}]}, "'an example.question' is missing"),
    ],
)
def test_a_damaged_evaluation_is_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(PlanError) as caught:
        page_of(make_plan(), tmp_path, **change)
    assert problem in caught.value.message


def test_pictures_are_pictures(tmp_path: Path) -> None:
    plan = make_plan()
    example = document(plan)["examples"][0] | {"images": ['x" onerror="alert(1)']}
    with pytest.raises(PlanError, match="no PNG or JPEG"):
        page_of(plan, tmp_path, examples=[example])


def test_an_evaluation_of_another_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="but the report is on"):
        page_of(make_plan(), tmp_path, visual_budget=0.99)


def test_scales_have_ticks_inside() -> None:
    for scale in (Scale(1e-7, 1e-4, 0, 1, is_log=True), Scale(0, 0.3, 0, 1), Scale(0.9, 1, 0, 1)):
        assert scale.ticks() and all(0 <= scale(value) <= 1 for value in scale.ticks())
