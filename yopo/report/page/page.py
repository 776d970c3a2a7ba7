"""The whole page: one HTML file that needs nothing else and loads nothing.

Whatever comes from plans and results is escaped by the template engine. On top of this, the page
forbids the browser everything but its own style, its own script and the pictures inside it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from yopo.plans.evaluated import is_of
from yopo.plans.flops import visual_budget
from yopo.report import units
from yopo.report.compare import Named, check_comparable
from yopo.report.page.bars import Bar, Group, bars_chart
from yopo.report.page.depth import PARTS
from yopo.report.page.heat import LEVELS
from yopo.report.page.results import Bench, Contender, Evaluation
from yopo.report.page.svg import clean
from yopo.report.page.variant import point_of, variant
from yopo.support.errors import PlanError
from yopo.support.files import PAGE_MARK
from yopo.support.version import __version__

_TEMPLATES = Path(__file__).parent / "templates"


def report_page(
    plans: Named,
    *,
    evaluations: Sequence[tuple[str, Evaluation]] = (),
    bench: tuple[str, Bench] | None = None,
    chosen: int = 0,
    command: str = "",
) -> str:
    """Write the page.

    Args:
        plans: Names and plans, for one model; at least one.
        evaluations: Names of files and evaluations, each of one of the plans.
        bench: The same of a benchmark of the model.
        chosen: Number of the plan that is shown first.
        command: The command that writes it.

    Raises:
        PlanError: The plans are of different decoders, or a result is of none of the plans.
    """
    check_comparable(plans)
    by_plan = _assigned(plans, evaluations)
    ordered = sorted(range(len(plans)), key=lambda place: visual_budget(plans[place][1]))
    points = [point_of(*plans[place], by_plan.get(place)) for place in ordered]
    variants = [
        variant(plans[place][1], by_plan.get(place), own, points)
        for place, own in zip(ordered, points, strict=True)
    ]
    if bench is not None:
        _check_bench(plans, *bench)
    style, script = (_text(name) for name in ("style.css", "script.js"))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            mark=Markup(PAGE_MARK),
            policy=_policy(style, script),
            style=Markup(style),
            script=Markup(script),
            title=f"{plans[0][1].model.name}: what pruning saves and loses",
            model=plans[0][1].model.name,
            variants=variants,
            chosen=ordered.index(chosen),
            bench=None if bench is None else _bench(bench[1]),
            bench_name=None if bench is None else bench[0],
            parts=PARTS,
            levels=range(LEVELS),
            command=command,
            version=__version__,
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else clean(value),
    )


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A content security policy that allows this style, this script and pictures in the page."""
    hashes = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    return (
        "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'; "
        "base-uri 'none'; form-action 'none'"
    ).format(*hashes)


def _assigned(plans: Named, evaluations: Sequence[tuple[str, Evaluation]]) -> dict[int, Evaluation]:
    """Number of a plan -> its evaluation; of several, the last one."""
    found: dict[int, Evaluation] = {}
    for name, each in evaluations:
        places = [
            place for place, (_, plan) in enumerate(plans) if is_of(plan, each.model, each.budget)
        ]
        if not places:
            known = ", ".join(f"{visual_budget(plan):.2%}" for _, plan in plans[:8])
            raise PlanError(
                f"{name}: evaluates a plan for {each.model} at {each.budget:.2%} of the visual "
                f"FLOPs, but the report is on {plans[0][1].model.name} at {known}.",
                remedy="Write it with `yopo eval` on one of these plans.",
            )
        found[places[0]] = each
    return found


def _check_bench(plans: Named, name: str, found: Bench) -> None:
    model = plans[0][1].model.name
    if found.model != model:
        raise PlanError(
            f"{name}: times {found.model}, but the report is on {model}.",
            remedy="Write it with `yopo bench PLAN_OR_DIR --json > FILE`.",
        )


def _bench(found: Bench) -> dict[str, Any]:
    used, total = found.layers
    layers = "" if used == total else f", {used} of {total} layers"
    weights = "" if found.weights == "checkpoint" else f", {found.weights} weights"
    where = (
        f"{found.batch} x ({found.visual} visual + {found.text} text tokens), {found.dtype}, "
        f"{found.device}{weights}{layers}; median of {found.runs} runs, in alternating order"
    )
    charts = (
        ("Prefill", "ms", [each.prefill_ms for each in found.contenders]),
        ("Decode, per token", "ms", [each.decode_ms for each in found.contenders]),
        ("Peak memory of the prefill", "B", [each.peak_bytes for each in found.contenders]),
        ("Visual KV cache", "B", [each.kv_bytes for each in found.contenders]),
    )
    return {
        "budget": units.share(found.budget),
        "where": where,
        "flops": units.share(found.flops_ratio),
        "charts": [
            (title, _contender_bars(found.contenders, values, unit, title))
            for title, unit, values in charts
            if all(value is not None for value in values)
        ],
        "missing": [title for title, _, values in charts if any(one is None for one in values)],
    }


def _contender_bars(
    contenders: Sequence[Contender], values: Sequence[float | None], unit: str, title: str
) -> Markup:
    known = [value or 0.0 for value in values]
    top = max(*known, 1e-12)
    groups = []
    for each, value in zip(contenders, known, strict=True):
        text = f"{value:.3g} ms" if unit == "ms" else units.num_bytes(value)
        kind = "dense" if each.name == "dense" else "pruned"
        groups.append(Group(each.name, [Bar(value / top, kind, text)]))
    return bars_chart(groups, title)
