"""The comparison of dense and pruned as one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from yopo.plans.flops import visual_budget
from yopo.report import units
from yopo.report.plan_tables import plain_table, savings

if TYPE_CHECKING:  # the evaluation needs torch, its table does not
    from yopo.evaluation.evaluate import Accuracy, Evaluation


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
        table.add_column(name, justify="right")
    if evaluation.accuracy is not None:
        table.add_row("accuracy", *_accuracy(evaluation.accuracy))
    for kind, counts in evaluation.by_kind.items():
        table.add_row(Text(f"  {kind}"), *_accuracy(counts))
    same = f"{evaluation.same_answers}/{evaluation.pairs}"
    table.add_row("same answer", "", same, units.share(evaluation.same_answers / evaluation.pairs))
    agreed = f"{round(fidelity.agreement * fidelity.tokens)}/{fidelity.tokens}"
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
    if time is not None:
        note = f"time: median of {time.runs} paired runs of {time.batch_size} prompts"
        parts += ["", Text(note, "dim")]
    return Group(*parts)


def _accuracy(counts: Accuracy) -> tuple[str, str, str]:
    kept = units.share(counts.pruned / counts.dense) if counts.dense else "-"
    return _share_of(counts.dense, counts.total), _share_of(counts.pruned, counts.total), kept


def _share_of(right: int, total: int) -> str:
    return f"{right}/{total}  {units.share(right / total):>7}"
