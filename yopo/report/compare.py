"""Several plans side by side: what each saves, what each loses, and where their layers differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from yopo.plans.evaluated import Evaluated, evaluated_of
from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_kv_bytes,
    prefill_flops,
    visual_budget,
    visual_flops_of_layer,
    visual_kv_bytes,
    visual_kv_bytes_of_layer,
)
from yopo.plans.quality import Quality, quality_of
from yopo.plans.schema import LayerPlan, PruningPlan, full_layer
from yopo.report import units
from yopo.report.plan_tables import plain_table, template_of
from yopo.support.errors import PlanError

Named = Sequence[tuple[str, PruningPlan]]
"""Plans with the names that the user gave them."""


def check_comparable(plans: Named) -> None:
    """Refuse plans whose layers cannot be told side by side.

    Raises:
        PlanError: Their models have decoders of different shapes.
    """
    (first, plan), *others = plans
    for name, other in others:
        if other.model.shape != plan.model.shape:
            raise PlanError(
                f"{name}: is for {other.model.name}, whose decoder differs from that of "
                f"{plan.model.name}, which {first} is for.",
                remedy="Compare plans of one model.",
            )


def comparison_document(plans: Named) -> dict[str, Any]:
    """The comparison as plain values.

    Returns:
        ``plans``, one entry each: ``name``, ``model``, ``template``, ``compensation``,
        ``visual_budget``, ``prefill_flops_ratio``, ``visual_kv_bytes`` and ``visual_kv_ratio`` of
        the plan's own ``workload``, ``quality`` and ``evaluated`` (or null), and ``layers`` with
        ``visual_flops_ratio`` and ``visual_kv_bytes``; and ``different_layers``, the indices of
        layers in which not all plans agree.
    """
    return {
        "plans": [_entry(name, plan) for name, plan in plans],
        "different_layers": [
            index for index, layers in enumerate(_by_layer(plans)) if _differs(layers)
        ],
    }


def _entry(name: str, plan: PruningPlan) -> dict[str, Any]:
    shape, workload, found = plan.model.shape, plan.workload, quality_of(plan)
    dense, evaluated = visual_flops_of_layer(full_layer(shape), shape, workload), evaluated_of(plan)
    layers = [
        {
            **{each.name: getattr(layer, each.name) for each in fields(layer)},
            "visual_flops_ratio": visual_flops_of_layer(layer, shape, plan.seen) / dense,
            "visual_kv_bytes": visual_kv_bytes_of_layer(layer, shape, plan.seen),
        }
        for layer in plan.layers
    ]
    return {
        "name": name,
        "model": plan.model.name,
        "template": _kind(plan),
        "compensation": plan.compensation,
        "visual_budget": visual_budget(plan),
        "prefill_flops_ratio": prefill_flops(plan) / dense_prefill_flops(shape, workload),
        "visual_kv_bytes": visual_kv_bytes(plan),
        "visual_kv_ratio": visual_kv_bytes(plan) / dense_visual_kv_bytes(shape, workload),
        "workload": {"visual": workload.visual, "text": workload.text},
        "quality": None if found is None else found.to_dict(),
        "evaluated": None if evaluated is None else vars(evaluated),
        "layers": layers,
    }


def comparison_report(plans: Named) -> RenderableType:
    """The comparison as tables: totals, kinds of pairs, and the layers that differ."""
    letters = [chr(ord("A") + place) for place in range(len(plans))]
    parts: list[RenderableType] = [_legend(letters, plans), "", _totals(letters, plans)]
    if any(_kinds(plan) for _, plan in plans):
        parts += ["", _kinds_table(letters, plans)]
    parts += ["", *_layers(letters, plans)]
    notes = _notes(plans)
    parts += [Text(line, "dim") for line in ("", *notes)] if notes else []
    return Group(*parts)


def _legend(letters: Sequence[str], plans: Named) -> Table:
    table = Table.grid(padding=(0, 2))
    for letter, (name, plan) in zip(letters, plans, strict=True):
        kind = f"{_kind(plan)}, {plan.compensation}"
        # A path's end tells plans apart, so it is folded, not cut.
        table.add_row(Text(letter, "bold"), Text(name, overflow="fold"), Text(kind, "dim"))
    return table


def _totals(letters: Sequence[str], plans: Named) -> Table:
    table = _columns("", letters)
    documents = [_entry(name, plan) for name, plan in plans]
    for label, key in (
        ("visual FLOPs", "visual_budget"),
        ("prefill FLOPs with text", "prefill_flops_ratio"),
        ("visual KV", "visual_kv_ratio"),
    ):
        table.add_row(label, *(units.share(each[key]) for each in documents))
    table.add_row("  per prompt", *(units.num_bytes(each["visual_kv_bytes"]) for each in documents))
    found = [_current(plan) for _, plan in plans]
    table.add_row("logit KL", *("-" if each is None else f"{each.kl:.3g}" for each in found))
    wholes = ("-" if each is None else units.share(each.whole_answers) for each in found)
    table.add_row("  whole answers", *wholes)
    table.add_row("  on pairs", *("-" if each is None else str(each.pairs) for each in found))
    evaluated = [evaluated_of(plan) for _, plan in plans]
    if any(each is not None and each.answered for each in evaluated):
        table.add_row("accuracy kept", *(_accuracy_kept(each) for each in evaluated))
    return table


def _accuracy_kept(found: Evaluated | None) -> str:
    if found is None or not found.dense:
        return "-"
    return units.share(found.pruned / found.dense)


def _kinds_table(letters: Sequence[str], plans: Named) -> Table:
    table = _columns("logit KL by kind", letters)
    by_plan = [_kinds(plan) for _, plan in plans]
    for kind in sorted({name for kinds in by_plan for name in kinds}):
        cells = (f"{kinds[kind].kl:.3g}" if kind in kinds else "-" for kinds in by_plan)
        table.add_row(Text(kind), *cells)
    return table


def _layers(letters: Sequence[str], plans: Named) -> Iterator[RenderableType]:
    rows = list(enumerate(_by_layer(plans)))
    same = sum(not _differs(layers) for _, layers in rows)
    yield Text(f"layers: {same} of {len(rows)} are the same in all", "dim")
    if same == len(rows):
        return
    table = _columns("layer", letters)
    for layers, run in groupby(rows, key=lambda row: row[1]):
        numbers = [index for index, _ in run]
        if _differs(layers):
            label = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
            table.add_row(label, *(Text(_cell(layer, layers[0])) for layer in layers))
    yield table
    yield Text("heads that read / attend, radius, neurons, rank, map, bits of K/V", "dim")
    if any(_has_other_heads(layer, layers[0]) for _, layers in rows for layer in layers):
        yield Text("*: as many heads as in A, but others", "dim")


def _cell(layer: LayerPlan, first: LayerPlan) -> str:
    return _layer(layer) + "*" * _has_other_heads(layer, first)


def _has_other_heads(layer: LayerPlan, first: LayerPlan) -> bool:
    return layer != first and _layer(layer) == _layer(first)


def _differs(layers: Sequence[LayerPlan]) -> bool:
    return len(set(layers)) > 1


def _layer(layer: LayerPlan) -> str:
    """A layer in one cell."""
    if layer.is_empty:
        return "-"
    radius = "" if layer.radius is None or not layer.attend_heads else f" r{layer.radius}"
    parts = [f"{len(layer.read_heads)}/{len(layer.attend_heads)}{radius}", f"{layer.neurons}n"]
    parts += [] if layer.qkv_rank is None else [f"q{layer.qkv_rank}"]
    parts += [f"m{layer.map_rank}"] if layer.map_rank else []
    if layer.key_bits is not None or layer.value_bits is not None:
        parts.append(f"{layer.key_bits or 16}/{layer.value_bits or 16}b")
    return " ".join(parts)


def _by_layer(plans: Named) -> Iterator[tuple[LayerPlan, ...]]:
    """The layers side by side. Baking renumbers heads, so beside a baked plan only counts tell."""
    is_numbered = not any(plan.baked for _, plan in plans)
    columns = [plan.layers if is_numbered else map(_counted, plan.layers) for _, plan in plans]
    return zip(*columns, strict=True)


def _counted(layer: LayerPlan) -> LayerPlan:
    """A layer with as many heads, the first ones."""
    return replace(
        layer,
        read_heads=tuple(range(len(layer.read_heads))),
        attend_heads=tuple(range(len(layer.attend_heads))),
    )


def _notes(plans: Named) -> list[str]:
    found, notes = [quality_of(plan) for _, plan in plans], []
    sources = {(plan.provenance.get("pairs"), plan.provenance.get("seed")) for _, plan in plans}
    if sum(each is not None for each in found) > 1 and len(sources) > 1:
        notes.append("KL: measured on different pairs, so that values are not comparable")
    if any(each is None or not each.is_current for each in found):
        notes.append("-: not measured, or edited since; `yopo eval` measures any plan")
    if len({plan.workload for _, plan in plans}) > 1:
        notes.append("FLOPs and KV: of each plan's own prompt, which differ")
    if len({plan.model.fingerprint for _, plan in plans if not plan.baked}) > 1:
        notes.append("the plans are of models with different weights")
    return notes


def _columns(first: str, letters: Sequence[str]) -> Table:
    table = plain_table()
    table.add_column(first)
    for letter in letters:
        table.add_column(letter, justify="right")
    return table


def _kind(plan: PruningPlan) -> str:
    named = template_of(plan.provenance) or plan.provenance.get("preset")
    return "own layers" if named is None else str(named)


def _current(plan: PruningPlan) -> Quality | None:
    found = quality_of(plan)
    return found if found is not None and found.is_current else None


def _kinds(plan: PruningPlan) -> dict[str, Any]:
    found = _current(plan)
    return {} if found is None else dict(found.kinds)
