"""A plan as tables: its model, its savings, and what each layer still does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_flops,
    dense_visual_kv_bytes,
    prefill_flops,
    visual_budget,
    visual_flops,
    visual_flops_of_layer,
    visual_kv_bytes,
    visual_kv_bytes_of_layer,
)
from yopo.plans.schema import LEVERS, LayerPlan, PruningPlan, full_layer, used_levers
from yopo.plans.servable import engine_problem
from yopo.report import units

_BAR = 8
"""Characters of a bar for a whole layer."""

_WIDE = 70
"""Minimum console width for bars in the layer table; every lever's column needs more."""

_LEVER_WIDTH = 6
"""Characters of a lever's column."""

_EIGHTHS = " ▏▎▍▌▋▊▉"


def header(plan: PruningPlan) -> RenderableType:
    """Model, decoder, prompt, budget and kind of plan, one line each."""
    model, shape = plan.model, plan.model.shape
    kv_heads = "" if shape.kv_heads == shape.heads else f" on {shape.kv_heads} KV heads"
    grids = ", ".join(f"{grid.rows} x {grid.cols}" for grid in plan.workload.grids)
    asked = "" if plan.budget.asked is None else f" ({units.share(plan.budget.asked)} requested)"
    named = template_of(plan.provenance) or plan.provenance.get("preset")
    kind = [f"shape {named}"] if named else []
    kind.append(f"compensation {plan.compensation}")
    kind.append("bidirectional" if plan.bidirectional else "causal")
    kind += ["baked"] if plan.baked else []
    problem = engine_problem(plan)
    lines = {
        "model": f"{model.name} ({model.family}, fingerprint {model.fingerprint[:12]})",
        "decoder": f"{shape.layers} layers of {shape.heads} heads{kv_heads}, {shape.ffn} neurons",
        "prompt": f"{plan.workload.visual} visual tokens ({grids}), {plan.workload.text} of text",
        "budget": f"{units.share(visual_budget(plan))} of the visual FLOPs{asked}",
        "plan": ", ".join(kind),
        "servable in vLLM": "yes" if problem is None else f"no, because {problem}",
    }
    if plan.reduction is not None:
        left = f"{plan.seen.visual} of {plan.workload.visual} tokens enter the first layer"
        lines["reduction"] = f"{plan.reduction.describe()}: {left}"
    table = Table.grid(padding=(0, 2))
    for label, value in lines.items():
        table.add_row(Text(label, style="dim"), Text(value))
    return table


def savings_table(plan: PruningPlan) -> Table:
    """Visual FLOPs, prefill FLOPs and visual KV bytes of one prompt: dense, pruned, share."""
    table = plain_table()
    table.add_column("one prompt")
    for name in ("dense", "pruned", "share"):
        table.add_column(name, justify="right")
    for label, dense, pruned, show in savings(plan):
        table.add_row(label, show(dense), show(pruned), units.share(pruned / dense))
    return table


def savings(plan: PruningPlan) -> tuple[tuple[str, int, int, Callable[[float], str]], ...]:
    """(label, dense, pruned, format) of everything that a plan saves."""
    shape, workload = plan.model.shape, plan.workload
    return (
        ("visual FLOPs", dense_visual_flops(shape, workload), visual_flops(plan), units.flops),
        (
            "prefill FLOPs with text",
            dense_prefill_flops(shape, workload),
            prefill_flops(plan),
            units.flops,
        ),
        (
            "visual KV, 16 bit",
            dense_visual_kv_bytes(shape, workload),
            visual_kv_bytes(plan),
            units.num_bytes,
        ),
    )


class LayerTable:
    """One row per run of equal layers; without bars on a narrow console."""

    def __init__(self, plan: PruningPlan):
        self.plan = plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shape, workload = self.plan.model.shape, self.plan.seen
        dense = visual_flops_of_layer(full_layer(shape), shape, self.plan.workload)
        levers = used_levers(self.plan)
        has_bars = options.max_width >= _WIDE + _LEVER_WIDTH * len(levers)
        table = plain_table()
        if levers and options.max_width < _WIDE:
            table.padding = (0, 1, 0, 0)
        table.add_column("layer", justify="right")
        table.add_column(f"heads /{shape.heads}", justify="right")
        table.add_column("attends")
        table.add_column(f"neurons /{shape.ffn}", justify="right")
        for lever in levers:
            table.add_column(lever.column, justify="right")
        table.add_column("FLOPs", justify="right")
        table.add_column("KV", justify="right")
        for first, last, layer in runs(self.plan.layers):
            ratio = visual_flops_of_layer(layer, shape, workload) / dense
            kv = visual_kv_bytes_of_layer(layer, shape, workload)
            flops = Text(f"{units.share(ratio):>7}" if ratio else "-")
            if has_bars:
                flops = Text.assemble((bar(ratio, _BAR), "cyan"), f" {flops.plain:>7}")
            table.add_row(
                str(first) if first == last else f"{first}-{last}",
                _count(len(layer.read_heads)),
                _reach(layer),
                _count(layer.neurons),
                *(_count(getattr(layer, lever.name)) for lever in levers),
                flops,
                units.num_bytes(kv) if kv else "-",
                style="dim" if layer.is_empty else "",
            )
        yield Text("what visual tokens still do, per layer", "dim")
        yield table


def runs(layers: Sequence[LayerPlan]) -> Iterator[tuple[int, int, LayerPlan]]:
    """(first, last, layer plan) of every run of layers with identical rows."""

    def look(entry: tuple[int, LayerPlan]) -> tuple[object, ...]:
        layer = entry[1]
        levers = (getattr(layer, each.name) for each in LEVERS)
        return layer.read_heads, layer.attend_heads, _reach(layer), layer.neurons, *levers

    for _, run in groupby(enumerate(layers), key=look):
        members = list(run)
        yield members[0][0], members[-1][0], members[0][1]


def template_of(document: Mapping[str, object]) -> object:
    """The template named by a plan's provenance or one of its candidates, under either key."""
    return document.get("template") or document.get("shape")


def plain_table() -> Table:
    """A table without a frame, for any width and any terminal."""
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")


def bar(ratio: float, width: int) -> str:
    """A bar of a given width, filled to ``ratio`` in eighths; anything above 0 is visible."""
    eighths = round(min(ratio, 1.0) * width * 8)
    eighths = max(eighths, 1) if ratio > 0 else 0
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _count(number: int | None) -> str:
    return str(number) if number else "-"


def _reach(layer: LayerPlan) -> str:
    if not layer.attend_heads:
        return "-"
    reach = [] if layer.radius is None else [f"radius {layer.radius}"]
    if layer.attend_heads != layer.read_heads:
        return ", ".join([f"in {len(layer.attend_heads)}", *reach])
    return ", ".join(reach) or "all"
