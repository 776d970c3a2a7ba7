"""``yopo calibrate --status``: how far the calibration in a work directory is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yopo.calibration.measure import SNAPSHOT
from yopo.pipeline.work import STATISTICS
from yopo.support.work_dir import Stage, Work, WorkDir

_TOTALS, _FINISHED, _PLANS = "totals", "finished", "totals-plans"


def note_begun(work: Work, totals: dict[str, int]) -> None:
    """Keep that not all is done, and how many there are of what: ``statistics``, ``comparison`` and
    ``holdout`` pairs, and ``layers``."""
    work.drop(_FINISHED)
    work.save(_TOTALS, Stage({}, totals))


def note_plans(work: Work, most: int) -> None:
    """Keep how many plans the request in progress measures at most."""
    work.save(_PLANS, Stage({}, {"most": most}))


def note_finished(work: Work) -> None:
    """Keep that all is done."""
    work.save(_FINISHED, Stage())


def status_of(path: Path) -> list[str]:
    """Lines about a work directory, or about those of several shares in it.

    Raises:
        OutputError: It is none, or damaged.
    """
    work, shares = WorkDir(path), sorted(path.glob("share-*/work.json"))
    if shares and not work.is_begun:
        return [line for share in shares for line in status_of(share.parent)]
    work.key()
    totals = next(iter(work.about(f"{_TOTALS}.")), {})
    lines = [f"{path}: {_state(work)}"]
    lines.append(f"statistics: {_statistics(work, totals)}")
    lines.append(f"dense answers: {_answers(work, totals)}")
    layers = work.count("profile-")
    done = bool(work.count("profile."))
    lines.append(f"profile: {_of(layers, totals.get('layers'), 'layers', done)}")
    judged = [each["kl"] for each in work.about("comparison-")]
    most = next((each["most"] for each in work.about(_PLANS)), None)
    best = f", lowest logit KL {min(judged):.3g}" if judged else ""
    at_most = "" if most is None else f" of at most {most} per budget"
    lines.append(f"plans: {len(judged)}{at_most} judged{best}")
    lines.append(f"fitted layers kept: {work.count('layer-')}")
    return lines


def _state(work: WorkDir) -> str:
    if work.is_in_use:
        return "in progress"
    if work.count(f"{_FINISHED}."):
        return "finished; the same command only writes its plan"
    return "interrupted; the same command goes on"


def _statistics(work: WorkDir, totals: dict[str, Any]) -> str:
    done = bool(work.count(f"{STATISTICS}."))
    pairs = sum(each["pairs"] for each in work.about(SNAPSHOT))
    return _of(pairs, totals.get("statistics"), "pairs", done)


def _answers(work: WorkDir, totals: dict[str, Any]) -> str:
    answered = sum(len(each["answers"]) for each in work.about("answers-"))
    total = sum(totals.get(name, 0) for name in ("comparison", "holdout"))
    return _of(answered, total, "pairs", total > 0 and answered >= total)


def _of(count: int, total: int | None, unit: str, is_done: bool) -> str:
    if is_done:
        return "done"
    return f"{count} {unit}" if total is None else f"{count} of {total} {unit}"
