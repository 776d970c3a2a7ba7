"""A benchmark as one table: times with quartiles, and the bound that the FLOPs allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from yopo.flops import visual_budget
from yopo.report import units
from yopo.report.tables import plain_table

if TYPE_CHECKING:  # the measuring needs torch, its table does not
    from yopo.evaluation.bench_result import Benchmark, Compared, Spread


def bench_report(found: Benchmark) -> RenderableType:
    """Dense against pruned: what was measured, beside what the plan predicts."""
    table = plain_table()
    table.add_column("")
    for name in ("dense", "pruned", "pruned / dense"):
        table.add_column(name, justify="right")
    dense, pruned = found.flops
    table.add_row(
        "prefill FLOPs", units.flops(dense), units.flops(pruned), units.share(found.flops_ratio)
    )
    for row in _times("prefill time", found.prefill):
        table.add_row(*row)
    table.add_row("  time / FLOPs", "", "", Text(f"{found.over_bound:.2f}x", "bold"))
    if found.decode is not None:
        for row in _times("decode, per token", found.decode):
            table.add_row(*row)
    if found.peak_memory is not None:
        table.add_row("peak memory", *_bytes(*found.peak_memory))
    table.add_row("visual KV", *_bytes(*found.visual_kv))
    notes = [Text(line, "dim") for line in _notes(found)]
    return Group(Text(_title(found), "bold"), _subtitle(found), "", table, "", *notes)


def _title(found: Benchmark) -> str:
    plan = found.plan
    named = plan.provenance.get("preset") or plan.provenance.get("shape") or "plan"
    return f"{plan.model.name}, {named}, visual budget {units.share(visual_budget(plan))}"


def _subtitle(found: Benchmark) -> str:
    prompt = found.plan.workload
    threads = f", {found.threads} thread{'s' * (found.threads > 1)}"
    return (
        f"{found.batch} x ({prompt.visual} visual + {prompt.text} text tokens), {found.dtype}, "
        f"{found.device}{threads if found.device == 'cpu' else ''}"
    )


def _notes(found: Benchmark) -> list[str]:
    layers, runs = found.layers, found.options.runs
    lines = []
    if found.weights == "random":
        some = ""
        if len(layers.used) < layers.total:
            numbers = ", ".join(str(index) for index in layers.used)
            some = (
                f" on {len(layers.used)} of {layers.total} layers ({numbers}: each kind in its "
                f"share; all of them: {units.share(layers.plan_flops_ratio)} of the FLOPs)"
            )
        lines.append(f"weights: random{some}")
    if found.stand_in:
        lines.append("model: a Llama decoder of the plan's shape stands in for its family")
    lines.append(
        f"time: median of {runs} pair{'s' * (runs > 1)}, order alternating; "
        "images encoded before, no LM head"
    )
    lines.append("time / FLOPs: 1.00x if all the saved work is saved time")
    if found.memory_by is None:
        lines.append(f"peak memory: not measured on {found.device}")
    else:
        lines.append(f"peak memory: of prefill, above the weights; {found.memory_by}")
    if found.visual_kv[1] != found.planned_kv:
        lines.append(f"visual KV: the plan predicts {units.num_bytes(found.planned_kv)}")
    return lines


def _times(label: str, times: Compared) -> tuple[tuple[RenderableType, ...], ...]:
    """Medians, and below them the quartiles."""
    columns = (times.dense, times.pruned)
    low, high = (f"{100 * each:.1f}" for each in (times.ratio.low, times.ratio.high))
    quartiles = (*(_quartiles(each) for each in columns), f"{low}-{high} %")
    return (
        (label, *(_ms(each) for each in columns), units.share(times.ratio.median)),
        tuple(Text(cell, "dim") for cell in ("  quartiles", *quartiles)),
    )


def _ms(spread: Spread) -> str:
    return f"{spread.median:.{_digits(spread)}f} ms"


def _quartiles(spread: Spread) -> str:
    digits = _digits(spread)
    return f"{spread.low:.{digits}f}-{spread.high:.{digits}f} ms"


def _digits(spread: Spread) -> int:
    return 0 if spread.median >= 1000 else 1 if spread.median >= 10 else 2


def _bytes(dense: int, pruned: int) -> tuple[str, str, str]:
    share = units.share(pruned / dense) if dense else "-"
    return units.num_bytes(dense), units.num_bytes(pruned), share
