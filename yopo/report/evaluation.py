"""The comparison of dense and pruned as one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from yopo.plans.flops import visual_budget
from yopo.report import units
from yopo.report.plan_tables import plain_table, savings
from yopo.support.binomial import interval

if TYPE_CHECKING:  # the evaluation needs torch, its table does not
    from yopo.evaluation.evaluate import Accuracy, Evaluation, Kept

ENOUGH = 100
"""Pairs from which a share is shown as such: its interval is then at most 20 points wide."""

_UNLIMITED = 10_000
"""Characters that no table needs."""


def evaluation_report(evaluation: Evaluation, data: str) -> RenderableType:
    """Accuracy and agreement that a plan keeps, and FLOPs, time and cache that it saves.

    Args:
        evaluation: From ``evaluate``.
        data: Name of the pairs.
    """
    plan, fidelity = evaluation.plan, evaluation.fidelity
    title = (
        f"{plan.model.name} at visual budget {units.share(visual_budget(plan))}, "
        f"{evaluation.pairs} pairs of {data}"
    )
    table = plain_table()
    table.add_column("")
    for name in ("dense", "pruned", "pruned / dense"):
        table.add_column(name, justify="right", no_wrap=True)
    if evaluation.accuracy is not None:
        table.add_row("accuracy", *_accuracy(evaluation.accuracy))
    same = f"{evaluation.same_answers}/{evaluation.pairs}"
    table.add_row("same answer", "", same, units.share(evaluation.same_answers / evaluation.pairs))
    agreed = f"{fidelity.agreed}/{fidelity.tokens}"
    table.add_row("same next token", "", agreed, units.share(fidelity.agreement))
    table.add_row("logit KL, nats", "", f"{fidelity.kl:.4f}", "")
    rows = [
        (label, show(dense), show(pruned), units.share(pruned / dense))
        for label, dense, pruned, show in savings(plan)
    ]
    time = evaluation.prefill
    if time is not None:
        cells = (f"{time.dense_ms:.1f} ms", f"{time.pruned_ms:.1f} ms", units.share(time.ratio))
        rows.insert(2, ("decoder prefill time", *cells))
    for row in rows:
        table.add_row(*row)
    parts: list[RenderableType] = [Text(title, "bold"), "", table]
    if len(evaluation.by_kind) > 1:
        parts += ["", KindTable(evaluation.kept)]
    if time is not None:
        note = f"time: median of {time.runs} paired runs of {time.batch_size} prompts"
        parts += ["", Text(note, "dim")]
    return Group(*parts)


class KindTable:
    """A rich renderable of what is kept of each kind of pair, the worst one marked.

    Where the console is too narrow for all columns, the share of whole answers is left out: their
    count and that of pairs stay.
    """

    def __init__(self, kept: Kept):
        self._kept = kept

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table(has_share=True)
        unlimited = options.update(max_width=_UNLIMITED)
        has_share = Measurement.get(console, unlimited, table).maximum <= options.max_width
        yield table if has_share else self._table(has_share=False)
        has_answers = self._kept.accuracy is not None
        share = ", and their share (few pairs: its 95 % interval)" * has_share
        notes = (
            "> the worst kind, by KL" + "; dense, pruned: right answers" * has_answers,
            f"same: whole answers as the dense model's{share}",
            "tokens: the same next token along the dense model's answer; KL in nats",
        )
        yield from (Text(note, "dim") for note in notes)

    def _table(self, *, has_share: bool) -> Table:
        table, kept = plain_table(), self._kept
        has_answers = kept.accuracy is not None
        for name in ("", "kind"):
            table.add_column(name)
        names = ["pairs", *["dense", "pruned"] * has_answers, "same", *["share"] * has_share]
        for name in (*names, "tokens", "KL"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, part in kept.by_kind.items():
            is_worst = name == kept.worst_kind
            counts = part.accuracy
            right = ["-", "-"] if counts is None else [str(counts.dense), str(counts.pruned)]
            cells = [
                str(part.pairs),
                *right * has_answers,
                str(part.same_answers),
                *[_share_or_interval(part.same_answers, part.pairs)] * has_share,
                units.share(part.fidelity.agreement),
                f"{part.fidelity.kl:.4f}",
            ]
            style = "bold" if is_worst else ""
            table.add_row(">" * is_worst, Text(name), *cells, style=style)
        return table


def _share_or_interval(count: int, total: int) -> str:
    """A share of enough pairs, or the interval in which few pairs leave it."""
    if total >= ENOUGH:
        return units.share(count / total)
    lower, upper = interval(count, total)
    return f"{100 * lower:.0f}-{100 * upper:.0f} %"


def _accuracy(counts: Accuracy) -> tuple[str, str, str]:
    kept = units.share(counts.pruned / counts.dense) if counts.dense else "-"
    return _share_of(counts.dense, counts.total), _share_of(counts.pruned, counts.total), kept


def _share_of(right: int, total: int) -> str:
    return f"{right}/{total}  {units.share(right / total):>7}"
