"""What a page shows of one plan: numbers, charts and examples, ready for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from yopo.plans.evaluated import evaluated_of
from yopo.plans.flops import visual_budget, visual_flops_of_layer, visual_kv_bytes_of_layer
from yopo.plans.quality import Quality, quality_of
from yopo.plans.schema import BEYOND_IMAGE, PruningPlan, full_layer, used_levers
from yopo.plans.servable import engine_problem
from yopo.report import units
from yopo.report.page.bars import Bar, Group, bars_chart
from yopo.report.page.depth import depth_chart, layers_chart
from yopo.report.page.front import Point, front_chart
from yopo.report.page.heat import heat_map, limits_of
from yopo.report.page.overlay import overlays
from yopo.report.page.results import Evaluation, Example
from yopo.report.page.svg import shorten
from yopo.report.plan_tables import runs, savings, template_of
from yopo.support.binomial import interval

MAX_CELLS = 20_000
"""Heads of all layers up to which there is a map of them; the largest published have 10 000."""

_HIDDEN = ("candidates", "quality", "evaluated")
"""Entries of the provenance that are shown elsewhere."""

_MOST_ENTRIES, _LONGEST = 40, 300


@dataclass(frozen=True)
class Loss:
    """How far a plan strays from the dense model, and where that is known from."""

    where: str
    pairs: int
    kl: float
    same: float
    right: tuple[int, int, int] | None = None


def loss_of(plan: PruningPlan, evaluation: Evaluation | None) -> Loss | None:
    """The loss: of the given evaluation, of one that the plan records, or of calibration."""
    if evaluation is not None:
        whole = evaluation.whole
        found = whole.right
        counts = None if found is None else (found.dense, found.pruned, found.total)
        same = whole.same / whole.pairs
        return Loss("evaluation pairs", whole.pairs, whole.kl, same, counts)
    recorded = evaluated_of(plan)
    if recorded is not None and recorded.pairs > 0:
        right = (recorded.dense, recorded.pruned, recorded.answered)
        counts = right if recorded.answered > 0 else None
        same = recorded.same_answers / recorded.pairs
        return Loss("evaluation pairs", recorded.pairs, recorded.kl, same, counts)
    measured = _current(plan)
    if measured is None:
        return None
    where = "calibration's comparison pairs"
    return Loss(where, measured.pairs, measured.kl, measured.whole_answers)


def point_of(name: str, plan: PruningPlan, evaluation: Evaluation | None) -> Point:
    """A plan as a point of the front.

    Its KL is calibration's where that is known, since this is what all plans have.
    """
    loss, found = loss_of(plan, evaluation), _current(plan)
    right = None
    if loss is not None and loss.right is not None:
        dense, pruned, total = loss.right
        right = (dense / total, pruned / total)
    kl = found.kl if found is not None else None if loss is None else loss.kl
    return Point(name, visual_budget(plan), kl, right)


def variant(
    plan: PruningPlan, evaluation: Evaluation | None, own: Point, points: Sequence[Point]
) -> dict[str, Any]:
    """Everything that the template shows of a plan.

    Args:
        plan: The plan.
        evaluation: Its evaluation, if one was given.
        own: The plan on the front, under the name that the user gave it.
        points: All plans of the page on the front.
    """
    loss, candidates, quality = loss_of(plan, evaluation), _candidates(plan), quality_of(plan)
    current = quality if quality is not None and quality.is_current else None
    return {
        "name": own.name,
        "budget": units.share(visual_budget(plan)),
        "headline": headline(plan, loss),
        "tiles": _tiles(plan, loss),
        "front": front_chart(points, candidates, own),
        "num_candidates": len(candidates),
        "layers": layers_chart(plan),
        "rows": _rows(plan),
        "levers": [lever.column for lever in used_levers(plan)],
        "measured": _measured(plan),
        "quality": current,
        "was_edited": quality is not None and current is None,
        "quality_chart": _quality_chart(current),
        "evaluation": evaluation,
        "kinds": None if evaluation is None else kinds_chart(evaluation),
        "kind_rows": [] if evaluation is None else _kind_rows(evaluation),
        "examples": [] if evaluation is None else [_shown(each) for each in evaluation.examples],
        "about": _about(plan),
        "provenance": _provenance(plan.provenance),
    }


def headline(plan: PruningPlan, loss: Loss | None) -> str:
    """The result in a sentence."""
    start = f"{plan.model.name} runs on {units.share(visual_budget(plan))} of its visual FLOPs"
    if loss is None:
        return f"{start}; what it loses has not been measured."
    if loss.right is not None:
        dense, pruned, total = loss.right
        if pruned == dense:
            return f"{start} and gives {pruned} of {total} right answers, as the dense model does."
        return (
            f"{start} and gives {pruned} of {total} right answers, where the dense model gives "
            f"{dense}."
        )
    return (
        f"{start} and answers like the dense model on {units.share(loss.same)} of the {loss.pairs} "
        f"{loss.where}."
    )


def _tiles(plan: PruningPlan, loss: Loss | None) -> list[tuple[str, str, str]]:
    """(value, name, detail) of the headline figures."""
    found = [
        (units.share(pruned / dense), label, f"{show(pruned)} of {show(dense)}")
        for label, dense, pruned, show in savings(plan)
    ]
    if loss is None:
        return found
    if loss.right is not None and loss.right[0]:
        dense, pruned, total = loss.right
        detail = f"{pruned} right, dense {dense}, of {total}"
        found.append((units.share(pruned / dense), "accuracy kept", detail))
    detail = f"of {loss.pairs} {loss.where}"
    found.append((units.share(loss.same), "same answers", detail))
    found.append((f"{loss.kl:.3g}", "logit KL", "nats per answer token"))
    return found


def _current(plan: PruningPlan) -> Quality | None:
    found = quality_of(plan)
    return found if found is not None and found.is_current else None


def _candidates(plan: PruningPlan) -> list[Point]:
    """The plans that calibration measured and did not choose."""
    listed = plan.provenance.get("candidates")
    found = []
    for each in listed[1:] if isinstance(listed, list) else []:
        if not isinstance(each, Mapping):
            continue
        values = [each.get(key) for key in ("budget", "kl")]
        budget, kl = (float(one) if isinstance(one, int | float) else -1.0 for one in values)
        if 0 <= budget <= 1 and kl >= 0:
            name = f"{template_of(each)}, {each.get('compensation')}"
            found.append(Point(shorten(name, 100), budget, kl))
    return found


def _rows(plan: PruningPlan) -> list[list[str]]:
    """The layer table, one row per run of equal layers."""
    shape, workload = plan.model.shape, plan.seen
    dense = visual_flops_of_layer(full_layer(shape), shape, plan.workload)
    rows, levers = [], used_levers(plan)
    for first, last, layer in runs(plan.layers):
        kv = visual_kv_bytes_of_layer(layer, shape, workload)
        radius = "any" if layer.radius is None else str(layer.radius)
        rows.append(
            [
                str(first) if first == last else f"{first}-{last}",
                str(len(layer.read_heads)),
                str(len(layer.attend_heads)),
                radius if layer.attend_heads else "-",
                str(layer.neurons),
                *(str(getattr(layer, each.name) or "-") for each in levers),
                units.share(visual_flops_of_layer(layer, shape, workload) / dense),
                units.num_bytes(kv),
            ]
        )
    return rows


def _measured(plan: PruningPlan) -> dict[str, Any] | None:
    if plan.measured is None:
        return None
    measured, shape = plan.measured, plan.model.shape
    small = shape.layers * shape.heads <= MAX_CELLS
    return {
        "heat": heat_map(plan) if small else None,
        "limits": [f"{limit:.2g}" for limit in limits_of(plan)],
        "cross_modal": depth_chart(
            measured.cross_modal, "share of the text's attention on the image", is_share=True
        ),
        "locality": _locality(measured.locality),
        "layers": shape.layers,
        "beyond": sum(radius >= BEYOND_IMAGE for radius in measured.locality),
        "concentration": depth_chart(
            measured.concentration, "share of neurons with 90 % of the importance", is_share=True
        ),
    }


def _locality(radii: Sequence[int]) -> Markup | None:
    """Radii over depth, as far as there are any."""
    known = [None if radius >= BEYOND_IMAGE else radius for radius in radii]
    if all(radius is None for radius in known):
        return None
    return depth_chart(known, "radius with 90 % of visual attention", is_share=False)


def kinds_chart(evaluation: Evaluation) -> Markup:
    """Right answers by kind, dense and pruned; without accepted answers, the same answers."""
    groups = []
    for name, part in {"all pairs": evaluation.whole, **evaluation.kinds}.items():
        if part.right is None:
            share = part.same / part.pairs
            bars = [Bar(share, "pruned", f"{part.same}/{part.pairs} same")]
        else:
            total = part.right.total
            bars = [
                Bar(count / total, kind, f"{count}/{total} {kind}")
                for kind, count in (("dense", part.right.dense), ("pruned", part.right.pruned))
            ]
        is_worst = name == evaluation.worst_kind and len(evaluation.kinds) > 1
        groups.append(Group(name, bars, is_worst))
    return bars_chart(groups, "Answers by kind of pair")


def _kind_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for name, part in {"all pairs": evaluation.whole, **evaluation.kinds}.items():
        lower, upper = interval(part.same, part.pairs)
        right = ("-", "-") if part.right is None else (part.right.dense, part.right.pruned)
        cells = [name, part.pairs, *right, part.same, f"{100 * lower:.0f}-{100 * upper:.0f} %"]
        rows.append([*map(str, cells), units.share(part.agreement), f"{part.kl:.3g}"])
    return rows


def _quality_chart(found: Quality | None) -> Markup | None:
    """KL by kind, as calibration measured it."""
    if found is None or len(found.kinds) < 2:
        return None
    top = max(each.kl for each in found.kinds.values()) or 1.0
    groups = [
        Group(name, [Bar(each.kl / top, "pruned", f"{each.kl:.3g}")], name == found.worst_kind)
        for name, each in found.kinds.items()
    ]
    return bars_chart(groups, "Logit KL by kind of pair")


def _shown(example: Example) -> dict[str, Any]:
    looks = [
        {
            "picture": Markup(each.picture),
            "maps": overlays(each),
            "mass": [units.share(sum(shares)) for shares in (each.dense, each.pruned)],
        }
        for each in example.looks
    ]
    return {"of": example, "images": [Markup(each) for each in example.images], "looks": looks}


def _about(plan: PruningPlan) -> list[tuple[str, str]]:
    model, shape, workload = plan.model, plan.model.shape, plan.workload
    grids = ", ".join(f"{grid.rows} x {grid.cols}" for grid in workload.grids[:8])
    grids += ", ..." if len(workload.grids) > 8 else ""
    problem = engine_problem(plan)
    asked = "" if plan.budget.asked is None else f", {units.share(plan.budget.asked)} requested"
    return [
        ("model", f"{model.name} ({model.family})"),
        ("fingerprint", model.fingerprint),
        (
            "decoder",
            f"{shape.layers} layers, {shape.heads} query heads on {shape.kv_heads} KV heads, "
            f"hidden width {shape.hidden}, {shape.ffn} neurons",
        ),
        ("prompt", f"{workload.visual} visual tokens ({grids}) and {workload.text} of text"),
        ("visual budget", f"{units.share(visual_budget(plan))}{asked}"),
        ("compensation", plan.compensation),
        ("visual attention", "bidirectional" if plan.bidirectional else "causal"),
        ("servable in vLLM", "yes" if problem is None else f"no, because {problem}"),
    ]


def _provenance(entries: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, value in list(entries.items())[:_MOST_ENTRIES]:
        if key in _HIDDEN:
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{name}: {each}" for name, each in value.items())
        found.append((shorten(str(key), 60), shorten(str(value), _LONGEST)))
    return found
