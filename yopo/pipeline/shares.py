"""Choose which share of the visual tokens a plan keeps: one calibration per share, compared.

Few tokens leave more FLOPs of a budget to each, and lose what the others showed; which is better
depends on the model and the method, so it is measured. All plans have the same budget and are
compared with the dense model on all tokens, on the same pairs, with answers recorded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from yopo.calibration.statistics import Statistics
from yopo.data.split import MIN_SIDE, too_few
from yopo.evaluation.fidelity import Recorded
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.session import Calibrated, CalibrationSession
from yopo.planning.candidate import kl_of
from yopo.planning.request import BudgetRequest, LatencyRequest, PlanRequest
from yopo.reduction.method import Method
from yopo.support.console import note
from yopo.support.errors import PlanError


def check_shares(*requests: PlanRequest) -> None:
    """Check that what is requested can choose among shares, before anything is measured.

    Raises:
        PlanError: There is no budget to compare plans at, or several.
    """
    remedy = "Give one budget, or a share of your own (--reduce NAME:SHARE)."
    if len(requests) > 1:
        what = "Plans for several budgets go into one checkpoint, so they keep the same tokens."
        raise PlanError(what, remedy=remedy)
    if not isinstance(requests[0], BudgetRequest | LatencyRequest):
        what = "Shares of tokens are compared at one budget, and none is given."
        raise PlanError(what, remedy=remedy)


def choose_share(
    handle: ModelHandle,
    request: PlanRequest,
    options: RunOptions,
    fit_options: FitOptions,
    *,
    keep: Callable[[Statistics], None] | None = None,
) -> Calibrated:
    """The plan of the least KL among those for every share of ``fit_options.shares``.

    Args:
        handle: The dense model; loaded once.
        request: The request for the plan.
        options: The data and how to run it.
        fit_options: How plans are measured and fitted.
        keep: Called once, with the statistics of the chosen plan.

    Raises:
        PlanError: No share has a plan within the budget.
        DataError: There are too few pairs to compare plans on.
    """
    best: Calibrated | None = None
    tried: list[dict[str, Any]] = []
    records: list[Recorded] | None = None
    for share in fit_options.shares:
        with _session(handle, request, options, fit_options, share) as session:
            if records is not None:
                session.judge.comparison = records
            made = _made(session, request, share)
            records = session.comparison
        tried.append(_entry(share, made))
        if made is not None and (best is None or _kl(made) < _kl(best)):
            best = made
    if best is None:
        raise PlanError(
            f"No share of the tokens has a plan within the budget ({_listed(tried)}).",
            remedy="Use a larger budget.",
        )
    if keep is not None:
        keep(best.statistics)
    tried.sort(key=lambda each: (each["kl"] is None, each["kl"]))
    chosen = best.plan.reduction
    note(f"Best of {_listed(tried)}: {'all tokens' if chosen is None else chosen.describe()}.")
    provenance = {**best.plan.provenance, "shares": tried}
    return replace(best, plan=replace(best.plan, provenance=provenance))


@contextmanager
def _session(
    handle: ModelHandle,
    request: PlanRequest,
    options: RunOptions,
    fit_options: FitOptions,
    share: float,
) -> Iterator[CalibrationSession]:
    """A calibration on a share of the tokens, with a part of the work directory to itself."""
    work = fit_options.work_dir
    own = replace(
        fit_options,
        shares=(),
        reduction=reduction_at(fit_options.reduction, share),
        work_dir=None if work is None else Path(work) / f"share-{share:g}",
    )
    session = CalibrationSession(handle, options, own, requests=(request,))
    try:
        if not session.split.comparison:
            raise too_few(session.split, "to compare shares of the tokens", 2 * MIN_SIDE)
        yield session
    finally:
        session.close()


def reduction_at(method: Method | None, share: float) -> Method | None:
    """A method that keeps a share of the tokens; None where it keeps all."""
    return None if method is None or share == 1 else replace(method, keep=share)


def _made(session: CalibrationSession, request: PlanRequest, share: float) -> Calibrated | None:
    """The plan of a session; None if the budget has none."""
    try:
        made = session.make(request)
    except PlanError as error:
        note(f"{share:.0%} of the tokens: {error.message}")
        return None
    session.finish()
    note(f"{share:.0%} of the tokens: logit KL {_kl(made):.3g}")
    return made


def _kl(made: Calibrated) -> float:
    return kl_of(made.candidates[0])


def _entry(share: float, made: Calibrated | None) -> dict[str, Any]:
    """What the provenance says of a share."""
    if made is None:
        return {"keep": share, "kl": None}
    first = made.plan.provenance["candidates"][0]
    names = ("kl", "budget", "whole_answers", "worst_kind", "worst_kl")
    return {"keep": share, **{name: first[name] for name in names if name in first}}


def _listed(tried: list[dict[str, Any]]) -> str:
    values = [
        f"{each['keep']:.0%}" + ("" if each["kl"] is None else f" (KL {each['kl']:.3g})")
        for each in tried
    ]
    return ", ".join(values)
