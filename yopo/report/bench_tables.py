"""A benchmark as tables: times with quartiles, and the bounds given by FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from yopo.plans.flops import visual_budget
from yopo.report import units
from yopo.report.plan_tables import plain_table, template_of

if TYPE_CHECKING:  # measuring needs torch, the tables do not
    from yopo.bench.result import Benchmark, Compared, Spread

DENSE, PRUNED = "dense", "pruned"


def bench_report(found: Benchmark) -> RenderableType:
    """Dense against pruned: measurements next to the plan's predictions."""
    table = plain_table()
    table.add_column("")
    for name in ("dense", "pruned", "pruned / dense"):
        table.add_column(name, justify="right", no_wrap=True)
    dense, pruned = found.flops
    table.add_row(
        "prefill FLOPs", units.flops(dense), units.flops(pruned), units.share(found.flops_ratio)
    )
    for row in _times("prefill time", found.prefill):
        table.add_row(*row)
    table.add_row("  time / FLOPs", "", "", Text(f"{found.over_bound:.2f}x", "bold"))
    table.add_row("  bound reached", *_reached(found, "prefill"), "")
    if found.decode is not None:
        for row in _times("decode, per token", found.decode):
            table.add_row(*row)
        table.add_row("  bytes per step", "", "", units.share(found.bytes_ratio_of(PRUNED)))
        table.add_row("  bound reached", *_reached(found, "decode"), "")
    for row in _shipped(found):
        table.add_row(*row)
    if found.peak_memory is not None:
        table.add_row("peak memory", *_bytes(*found.peak_memory))
    table.add_row("visual KV", *_bytes(*found.visual_kv))
    if found.visual_kv[1]:
        kept = found.planned_kv / found.visual_kv[1]
        table.add_row("  bound reached", "", "", units.share(kept))
    parts: list[RenderableType] = [Text(_title(found), "bold"), _subtitle(found), "", table]
    if found.baselines:
        parts += ["", prefill_table(found), "", memory_table(found)]
    if found.contexts:
        parts += ["", context_table(found)]
    return Group(*parts, "", *(Text(line, "dim") for line in _notes(found)))


def _reached(found: Benchmark, what: str) -> list[str]:
    bound = found.prefill_bound_of if what == "prefill" else found.decode_bound_of
    return [_share(bound(name)) for name in (DENSE, PRUNED)]


def _share(value: float | None) -> str:
    """Empty where nothing was measured."""
    return "" if value is None else units.share(value)


def _shipped(found: Benchmark) -> Iterator[tuple[RenderableType, ...]]:
    """Rows for stock transformers, if it uses other kernels."""
    if found.shipped is None:
        return
    yield from _times("as shipped: prefill", found.shipped.prefill)
    yield "  time / FLOPs", "", "", f"{found.over_bound_as_shipped:.2f}x"
    if found.shipped.decode is not None:
        yield from _times("as shipped: decode", found.shipped.decode)


def prefill_table(found: Benchmark) -> Table:
    """One row per contender: its prefill time, and what its FLOPs would allow."""
    table = _table("prefill", "visual FLOPs", "FLOPs", "time", "/ dense", "/ FLOPs", "bound")
    for name, measured in found.measured.items():
        times, digits = measured.prefill, _digits(measured.prefill.pruned)
        ratio = found.flops_ratio_of(name)
        is_dense = name == DENSE
        table.add_row(
            _label(found, name),
            units.share(found.visual_budget_of(name)),
            units.share(ratio),
            f"{times.pruned.median:.{digits}f} ms",
            "" if is_dense else units.share(times.ratio.median),
            "" if is_dense else f"{times.ratio.median / ratio:.2f}x",
            units.share(found.prefill_bound_of(name)),
        )
        low, high = (f"{100 * each:.1f}" for each in (times.ratio.low, times.ratio.high))
        span = f"{times.pruned.low:.{digits}f}-{times.pruned.high:.{digits}f}"
        cells = ("", "", "", span, "" if is_dense else f"{low}-{high}")
        table.add_row(*(Text(cell, "dim") for cell in cells))
    return table


def memory_table(found: Benchmark) -> Table:
    """One row per contender: a decode step and its bound, peak memory, cache."""
    table = _table("decode, memory", "per token", "/ dense", "bound", "peak", "visual KV")
    for name, measured in found.measured.items():
        decode, peak = measured.decode, measured.peak_memory
        table.add_row(
            _label(found, name),
            "-" if decode is None else _ms(decode.pruned),
            "" if decode is None or name == DENSE else units.share(decode.ratio.median),
            _share(found.decode_bound_of(name)),
            "-" if peak is None else units.num_bytes(peak),
            units.num_bytes(measured.visual_kv),
        )
    return table


def context_table(found: Benchmark) -> Table:
    """One row per context: decode steps over the dense one's; below, what bytes allow."""
    names = [name for name in found.contexts[0].decode if name != DENSE]
    table = _table("decode / dense", "dense", *(_label(found, name) for name in names))
    for at in found.contexts:
        cells = [units.share(at.decode[name].ratio.median) for name in names]
        table.add_row(f"{at.context} tokens", _ms(at.decode[DENSE].pruned), *cells)
        bounds = [units.share(found.bytes_ratio_of(name, at.plan)) for name in names]
        table.add_row(*(Text(cell, "dim") for cell in ("  bytes", "", *bounds)))
    return table


def _table(first: str, *columns: str) -> Table:
    table = plain_table()
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _label(found: Benchmark, name: str) -> str:
    if name in found.baselines:
        return found.baselines[name].label
    return "yopo" if name == PRUNED else name


def _title(found: Benchmark) -> str:
    plan = found.plan
    named = plan.provenance.get("preset") or template_of(plan.provenance) or "plan"
    return f"{plan.model.name}, {named}, visual budget {units.share(visual_budget(plan))}"


def _subtitle(found: Benchmark) -> str:
    prompt = found.plan.workload
    threads = f", {found.threads} thread{'s' * (found.threads > 1)}"
    return (
        f"{found.batch} x ({prompt.visual} visual + {prompt.text} text tokens), {found.dtype}, "
        f"{found.device}{threads if found.device == 'cpu' else ''}"
    )


def _kernel_notes(found: Benchmark) -> list[str]:
    if found.shipped is None:
        return []
    if not found.device.startswith("cuda"):
        return [
            "as shipped: dense is stock transformers, whose products use a slower kernel;",
            "  any ratio below the FLOPs comes from the kernel, not from the plan",
        ]
    if not found.cuda_graphs:
        return [
            "CUDA graphs: not used, on either side",
            "as shipped: dense is stock transformers",
        ]
    return [
        "CUDA graphs: prefills of dense and pruned are replayed, in the same runtime; those of "
        "baselines are not",
        "as shipped: dense is stock transformers, without CUDA graphs",
    ]


def _notes(found: Benchmark) -> list[str]:
    layers, runs = found.layers, found.options.runs
    lines = []
    if found.weights == "random":
        some = ""
        if len(layers.used) < layers.total:
            numbers = ", ".join(str(index) for index in layers.used)
            some = (
                f" on {len(layers.used)} of {layers.total} layers ({numbers}: each kind in "
                f"proportion; all layers: {units.share(layers.plan_flops_ratio)} of the FLOPs)"
            )
        lines.append(f"weights: random{some}")
    if found.stand_in:
        lines.append("model: a Llama decoder of the plan's shape replaces its family's")
    lines.append(
        f"time: median of {runs} pair{'s' * (runs > 1)}, in alternating order; "
        "without image encoding and LM head"
    )
    lines.append("time / FLOPs: 1.00x if all saved work is saved time; on the same kernels")
    lines += _kernel_notes(found)
    lines.append(
        f"bound reached: in prefill, FLOPs at the {found.rates.flops / 1e6:.3g} GFLOP/s of a plain "
        "product"
    )
    lines.append(
        "  of that length; in decode, a step's bytes (weights, KV cache) at the "
        f"{found.rates.bytes / 1e6:.3g} GB/s"
    )
    lines.append("  of reading weights; for visual KV, the planned over the measured bytes")
    lines += [
        f"measurement is unreliable: {what} reaches {units.share(share)} of the possible rate; "
        "close other programs and repeat"
        for what, share in found.off.items()
    ]
    if found.memory_by is None:
        lines.append(f"peak memory: not measured on {found.device}")
    else:
        lines.append(f"peak memory: during prefill, without the weights; {found.memory_by}")
    if found.visual_kv[1] != found.planned_kv:
        lines.append(f"visual KV: the plan predicts {units.num_bytes(found.planned_kv)}")
    return lines + _baseline_notes(found)


def _baseline_notes(found: Benchmark) -> list[str]:
    lines = []
    if found.baselines or found.left_out:
        where = ""
        if len(found.layers.used) < found.layers.total:
            where = f", solved on all {found.layers.total} layers"
        lines.append(f"baselines: at the plan's visual FLOPs or below{where}")
    shape, workload = found.plan.model.shape, found.plan.workload
    for method in found.baselines.values():
        source = f" ({method.source})" if method.source else ""
        lines.append(f"{method.label}: {method.describe(shape, workload)}{source}")
    lines += [f"left out: {reason}" for reason in found.left_out.values()]
    return lines


def _times(label: str, times: Compared) -> tuple[tuple[RenderableType, ...], ...]:
    """A row of medians and a row of quartiles."""
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
