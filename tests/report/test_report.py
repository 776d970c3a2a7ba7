"""Reports have the right numbers and widths, no color in a pipe, and need no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from yopo.plans.flops import visual_budget, visual_kv_bytes
from yopo.plans.grid import Grid
from yopo.plans.schema import (
    Budget,
    LayerPlan,
    Measured,
    ModelIdentity,
    ModelShape,
    PruningPlan,
    Workload,
)
from yopo.report import units
from yopo.report.candidates import CandidateTable
from yopo.report.heatmap import DROPPED, KEPT, Heatmap
from yopo.report.json import plan_document
from yopo.report.plan_tables import LayerTable, bar, runs, savings_table
from yopo.report.profile import LEVELS, Profile, pooled, sparkline
from yopo.report.summary import plan_report

GONE = LayerPlan((), attend_heads=(), radius=None, neurons=0)


def make_plan(layers: int = 8, heads: int = 8, *, kv_heads: int | None = None) -> PruningPlan:
    """Make a plan whose layers differ: whole, near, frozen, gone."""
    shape = ModelShape(layers, 16 * heads, heads, kv_heads or heads, 16, 352)
    every = tuple(range(heads))
    kinds = (
        LayerPlan(every, attend_heads=every, radius=None, neurons=352),
        LayerPlan(every[::2], attend_heads=every[::2], radius=2, neurons=88),
        LayerPlan(every[:1], attend_heads=(), radius=None, neurons=0),
    )
    measured = Measured(
        rho=tuple(tuple((1 + row * heads + col) / 100 for col in every) for row in range(layers)),
        cross_modal=tuple(row / layers for row in range(layers)),
        concentration=(0.5,) * layers,
        locality=tuple(range(layers)),
    )
    return PruningPlan(
        ModelIdentity("llava-tiny", "llava", shape, "ab" * 32),
        Workload((Grid(8, 8),), text=14, text_before=2),
        (*kinds, *(GONE,) * (layers - len(kinds))),
        Budget(0.25, 0.2),
        measured=measured,
        provenance={"template": "light"},
    )


def text_of(renderable: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=StringIO(), width=width)
    console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("layers", "heads"), [(8, 8), (32, 32), (40, 40), (64, 128)])
def test_everything_fits_the_width_without_color(width: int, layers: int, heads: int) -> None:
    plan = make_plan(layers, heads)
    lines = text_of(plan_report(plan), width)
    assert max(map(len, lines)) <= width
    assert "\x1b" not in "".join(lines) and "…" not in "".join(lines)
    assert sum(line.startswith("    0 ") for line in lines) == 2  # layer 0: one row per picture


def test_totals_are_shown() -> None:
    plan = make_plan()
    table = "\n".join(text_of(savings_table(plan)))
    assert units.share(visual_budget(plan)) in table
    assert units.num_bytes(visual_kv_bytes(plan)) in table
    assert "prefill FLOPs with text" in table


def test_a_plan_without_measurements_can_be_shown() -> None:
    lines = text_of(plan_report(replace(make_plan(), measured=None)))
    assert any("has no measurements" in line for line in lines)
    assert plan_document(replace(make_plan(), measured=None))["measured"] is None


def test_equal_layers_are_one_row() -> None:
    plan = make_plan()
    found = [(first, last) for first, last, _ in runs(plan.layers)]
    assert found == [(0, 0), (1, 1), (2, 2), (3, 7)]
    row = next(line for line in text_of(plan_report(plan)) if line.lstrip().startswith("3-7"))
    assert row.split() == ["3-7"] + ["-"] * 5


def make_fitted(layers: int = 8, heads: int = 8, **kinds: int) -> PruningPlan:
    """Make a refit plan with subsets of attending heads, bottlenecks and maps."""
    plan = make_plan(layers, heads, **kinds)
    every = tuple(range(heads))
    first = (
        LayerPlan(every, every[::2], None, 88, qkv_rank=12, map_rank=4),
        LayerPlan(every[::2], every[2::2], 2, 88, qkv_rank=64),
        LayerPlan(every[::2], every[::2], 2, 88, qkv_rank=64),
        LayerPlan(every[:1], (), None, 0, map_rank=16),
    )
    return replace(plan, layers=(*first, *(GONE,) * (layers - 4)), compensation="refit")


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("layers", "heads"), [(8, 8), (40, 40), (64, 128)])
def test_a_fitted_plan_fits_the_width(width: int, layers: int, heads: int) -> None:
    lines = text_of(plan_report(make_fitted(layers, heads)), width)
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)


@pytest.mark.parametrize("width", [80, 120])
def test_fitted_layers_have_rows(width: int) -> None:
    lines = text_of(LayerTable(make_fitted()), width)
    assert lines[1].split() == "layer heads /8 attends neurons /352 rank map FLOPs KV".split()
    rows = [line.split() for line in lines[2:]]
    assert rows[0][:7] == ["0", "8", "in", "4", "88", "12", "4"]
    assert rows[1][:8] == ["1", "4", "in", "3,", "radius", "2", "88", "64"] and rows[1][8] == "-"
    assert rows[2][:7] == ["2", "4", "radius", "2", "88", "64", "-"]
    assert rows[3][:6] == ["3", "1", "-", "-", "-", "16"]
    assert rows[4] == ["4-7"] + ["-"] * 7
    assert any(glyph in "".join(lines) for glyph in "▏▎▍▌▋▊▉") == (width == 120)


def test_a_table_has_only_the_columns_that_a_plan_uses() -> None:
    head = text_of(LayerTable(make_plan()))[1]
    assert "rank" not in head and "map" not in head
    fitted = make_fitted()
    straight = replace(fitted, layers=tuple(replace(each, qkv_rank=None) for each in fitted.layers))
    head = text_of(LayerTable(straight))[1]
    assert "rank" not in head and "map" in head


@pytest.mark.parametrize("change", [{"attend_heads": (0,)}, {"qkv_rank": 3}, {"map_rank": 3}])
def test_layers_that_differ_only_in_a_fit_are_two_rows(change: dict[str, object]) -> None:
    layer = LayerPlan((0, 1, 2), (1,), None, 5, qkv_rank=2, map_rank=2)
    found = [span for *span, _ in runs((layer, layer, replace(layer, **change)))]
    assert found == [[0, 1], [2, 2]]


def test_json_holds_the_fits() -> None:
    def fits(layer: dict[str, object]) -> tuple[object, ...]:
        return layer["qkv_rank"], layer["map_rank"], layer["attend_heads"]

    plan = make_fitted()
    document = json.loads(json.dumps(plan_document(plan)))
    first, _, third, last = document["layers"][:4]
    assert document["compensation"] == "refit"
    assert fits(first) == (12, 4, [0, 2, 4, 6])
    assert fits(third) == (64, 0, [0, 2, 4, 6])
    assert fits(last) == (None, 16, [])
    assert (
        sum(layer["visual_flops"] for layer in document["layers"])
        == (document["visual_flops"]["pruned"])
    )


def test_layers_have_rows() -> None:
    rows = [line.split() for line in text_of(plan_report(make_plan()), 60)]
    assert ["0", "8", "all", "352", "100.0", "%", "32.8", "kB"] in rows
    assert ["2", "1", "-", "-", "1.9", "%", "4.1", "kB"] in rows
    near = next(row for row in rows if row[:4] == ["1", "4", "radius", "2"])
    assert near[4] == "88" and near[-2:] == ["16.4", "kB"]


def test_grouped_heads_share_their_kv() -> None:
    plan = make_plan(heads=8, kv_heads=2)
    layers = plan_document(plan)["layers"]
    assert [each["visual_kv_bytes"] for each in layers[:4]] == [8192, 8192, 4096, 0]
    assert "8 heads on 2 KV heads" in "\n".join(text_of(plan_report(plan)))


def test_the_heatmap_marks_kept_heads_and_grows_with_rho() -> None:
    plan = make_plan()
    lines = text_of(Heatmap(plan))
    rows = [line[6:] for line in lines if line[:5].strip().isdigit()]
    assert [len(row) for row in rows] == [8] * 8
    for row, layer in zip(rows, plan.layers, strict=True):
        for head, glyph in enumerate(row):
            assert glyph in (KEPT if head in layer.read_heads else DROPPED)
    steps = [(KEPT if glyph in KEPT else DROPPED).index(glyph) for row in rows for glyph in row]
    assert steps == sorted(steps) and [steps.count(step) for step in range(4)] == [16] * 4


def test_the_heatmap_of_many_heads_shows_the_most_active_neighbor() -> None:
    plan = make_plan(heads=128)
    lines = text_of(Heatmap(plan), 60)
    rows = [line[6:] for line in lines if line[:5].strip().isdigit()]
    assert {len(row) for row in rows} == {43} and "3 heads" in lines[-1]
    assert rows[1][0] in KEPT and rows[2][0] in KEPT and rows[2][1] in DROPPED


def test_a_heatmap_of_equal_heads_can_be_drawn() -> None:
    plan = make_plan()
    rho = ((0.0,) * 8,) * 8
    assert text_of(Heatmap(replace(plan, measured=replace(plan.measured, rho=rho))))


def test_the_profile_shows_no_radius_beyond_the_image() -> None:
    plan = make_plan()
    assert plan.measured is not None
    for radii, said in (((2, 65), "2 to none"), ((65, 65), "none to none"), ((2, 3), "2 to 3")):
        every = radii + radii[-1:] * (plan.model.shape.layers - 2)
        found = text_of(Profile(replace(plan, measured=replace(plan.measured, locality=every))), 80)
        assert any(line.endswith(said) for line in map(str.rstrip, found)), found


def test_the_profile_pools_layers_if_it_is_narrow() -> None:
    wide, narrow = (text_of(Profile(make_plan(layers=64)), width) for width in (120, 60))
    assert "per bar" not in wide[0] and "4 per bar" in narrow[0]
    bars = [sum(glyph in LEVELS for glyph in line) for line in (wide[1], narrow[1])]
    assert bars == [64, 16]


def test_small_plots_are_drawn_in_text() -> None:
    assert sparkline([0, 0.5, 1], 1.0) == "▁▅█" and sparkline([0, 0], 0) == "▁▁"
    assert pooled([1, 3, 5], 2) == [2, 5]
    assert [bar(ratio, 2) for ratio in (0, 1e-6, 0.5, 1)] == ["  ", "▏ ", "█ ", "██"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.flops(7_634_000_000_000), "7.63 T"),
        (units.flops(999), "999"),
        (units.num_bytes(262_144), "262.1 kB"),
        (units.num_bytes(12), "12 B"),
        (units.share(0.12345), "12.3 %"),
    ],
)
def test_numbers_have_units(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize("key", ["template", "shape"])  # the latter in old plans
def test_candidates_are_listed(key: str) -> None:
    rows = [
        {key: "reader", "compensation": "mean", "budget": 0.25, "kl": 0.0123},
        {key: "paper", "compensation": "none", "budget": 0.2, "kl": None},
    ]
    lines = text_of(CandidateTable(rows), 60)
    assert lines[-2].split() == [">", "reader", "mean", "25.0", "%", "0.0123"]
    assert lines[-1].split() == ["paper", "none", "20.0", "%", "not", "measured"]
    assert "held-out" not in " ".join(lines)
    assert text_of(CandidateTable(rows, 64), 90)[-1].strip() == "on 64 held-out pairs"


def test_a_candidate_is_a_line_whatever_its_name() -> None:
    kind = "9-32 tokens, 'is there ...'"
    name = "allocated, visual weight 0.303, radius 2 and layer factors, keys in 4 bits"
    row = {"template": name, "compensation": "refit", "budget": 0.25, "kl": 0.0123}
    row |= {"whole_answers": 0.5, "worst_kind": kind, "worst_kl": 0.02}
    for width in (60, 80, 120):
        lines = text_of(CandidateTable([row] * 3, 64), width)
        assert len(lines) == 7 and max(map(len, lines)) <= width
        assert all("weigh" in line and "0.0123" in line for line in lines[2:5])


def test_json_output_is_plain_and_complete() -> None:
    plan = make_plan()
    document = json.loads(json.dumps(plan_document(plan)))
    assert list(document) == [
        *("model", "workload", "budget", "compensation", "bidirectional", "baked"),
        "servable",
        *("visual_flops", "prefill_flops", "visual_kv_bytes", "layers", "measured"),
        *("quality", "evaluated", "provenance"),
    ]
    assert document["visual_flops"]["ratio"] == visual_budget(plan)
    flops = sum(layer["visual_flops"] for layer in document["layers"])
    kv_bytes = sum(layer["visual_kv_bytes"] for layer in document["layers"])
    assert flops == document["visual_flops"]["pruned"]
    assert kv_bytes == document["visual_kv_bytes"]["pruned"] == visual_kv_bytes(plan)
    assert document["layers"][1]["read_heads"] == [0, 2, 4, 6]


def test_reports_import_no_torch() -> None:
    modules = "summary, json, evaluation, compare, quality, candidates, plan_tables, bench_tables, "
    modules += "heatmap, profile, units"
    code = f"import sys; from yopo.report import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
