"""What is lost, next to what is saved: the KL that calibration measured, in all and by kind."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from yopo.plans.evaluated import Evaluated, evaluated_of
from yopo.plans.quality import OPTIMISTIC, Quality, quality_of
from yopo.plans.schema import PruningPlan
from yopo.report import units
from yopo.report.plan_tables import plain_table


def quality_report(plan: PruningPlan) -> RenderableType:
    """The measured KL, or why there is none, and the evaluation that the plan records."""
    found = evaluated_of(plan)
    return _measured(plan) if found is None else Group(_measured(plan), "", _evaluated(found))


def _evaluated(found: Evaluated) -> RenderableType:
    same = units.share(found.same_answers / found.pairs)
    text = f"evaluated on {found.pairs} pairs: logit KL {found.kl:.3g}, same answers {same}"
    if found.answered:
        text += f", right answers {found.pruned} of {found.answered} (dense: {found.dense})"
    return Text(text)


def _measured(plan: PruningPlan) -> RenderableType:
    """A table of the KL that calibration measured, or a line that says why there is none."""
    found = quality_of(plan)
    if found is None:
        return Text(
            "quality: not measured; `yopo eval` compares the pruned model with the dense one", "dim"
        )
    if not found.is_current:
        return Text("quality: measured before the plan was edited; `yopo eval` measures it", "dim")
    table = plain_table()
    table.add_column("against the dense model")
    for name in ("pairs", "logit KL", "whole answers"):
        table.add_column(name, justify="right")
    worst = found.worst_kind if len(found.kinds) > 1 else None
    for name, each in {"all pairs": found, **found.kinds}.items():
        label = f"> {name}" if name == worst else f"  {name}" if each is not found else name
        cells = (str(each.pairs), f"{each.kl:.3g}", units.share(each.whole_answers))
        table.add_row(Text(label), *cells, style="bold" if name == worst else "")
    notes = ["KL in nats per answer token, on pairs that nothing was fitted on;", f"  {OPTIMISTIC}"]
    if worst is not None:
        notes.insert(0, "> the worst kind, by KL")
    return Group(table, *(Text(line, "dim") for line in notes))


def quality_words(found: Quality | None) -> str:
    """The quality in a few words."""
    if found is None:
        return "not measured"
    if not found.is_current:
        return "measured before the plan was edited"
    worst = found.worst_kind
    tail = "" if worst is None else f"; worst kind {worst}, KL {found.kinds[worst].kl:.3g}"
    return (
        f"logit KL {found.kl:.3g} nats per answer token to the dense model on {found.pairs} pairs, "
        f"{units.share(found.whole_answers)} of whole answers alike{tail}"
    )
