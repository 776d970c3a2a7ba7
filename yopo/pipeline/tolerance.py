"""How well a tolerance is met: agreement with the dense model, and what that proves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from yopo.evaluation.fidelity import Fidelity
from yopo.planning.request import ToleranceRequest
from yopo.plans.schema import PruningPlan
from yopo.support.binomial import CONFIDENCE, trials_needed, upper_bound
from yopo.support.console import note, warn

MAX_HOLDOUT = 256
"""Most holdout pairs, unless a tolerance on whole answers takes more to be shown."""


@dataclass(frozen=True)
class Agreement:
    """How many of the dense model's tokens, or whole answers, a plan predicts alike.

    Attributes:
        agreed: Those that it does.
        trials: All that were compared.
    """

    agreed: int
    trials: int

    @property
    def share(self) -> float:
        """Share that agrees."""
        return self.agreed / self.trials

    @property
    def error_bound(self) -> float:
        """One-sided 95 % Clopper-Pearson upper bound of the share that differs."""
        return upper_bound(self.trials - self.agreed, self.trials)

    def is_within(self, tolerance: float) -> bool:
        """Whether the share that differs is at most a tolerance."""
        return self.share >= 1 - tolerance


def agreement_on(fidelity: Fidelity, measure: str) -> Agreement:
    """The agreement of ``tokens`` or whole ``answers`` (see ``ToleranceRequest.tolerance_on``)."""
    if measure == "answers":
        return Agreement(fidelity.whole_answers, len(fidelity.by_pair))
    return Agreement(fidelity.agreed, fidelity.tokens)


def all_of(answers: Sequence[list[int]], measure: str) -> Agreement:
    """The agreement of a plan that prunes nothing with the dense model's answers."""
    trials = len(answers) if measure == "answers" else sum(map(len, answers))
    return Agreement(trials, trials)


def holdout_pairs(request: ToleranceRequest) -> int:
    """How many pairs to hold out at most: enough to show the tolerance where pairs are trials."""
    if request.tolerance_on == "answers":
        return max(MAX_HOLDOUT, trials_needed(request.tolerance))
    return MAX_HOLDOUT


def warn_if_unsupported(request: ToleranceRequest, found: Agreement, pairs: int) -> None:
    """Say so where so few trials could not show the tolerance, not even without an error.

    Args:
        request: What is asked for.
        found: The agreement of a plan without an error.
        pairs: Pairs that the trials come from.
    """
    needed = trials_needed(request.tolerance)
    if found.trials >= needed:
        return
    held_out = -(-needed * pairs // found.trials)
    what = "answers" if request.tolerance_on == "answers" else f"answer tokens of {pairs} pairs"
    warn(
        f"{found.trials} holdout {what} cannot support a tolerance of {request.tolerance:.2%}: "
        f"without a single error, the error may still be {found.error_bound:.1%} "
        f"({CONFIDENCE:.0%} confidence). It takes {held_out} holdout pairs, a quarter of "
        f"{4 * held_out} (--data, --samples)."
    )


def provenance_of(request: ToleranceRequest, found: Agreement, pairs: int) -> dict[str, Any]:
    """What a plan says of its tolerance."""
    return {
        "asked": request.tolerance,
        "on": request.tolerance_on,
        "agreement": round(found.share, 6),
        "error_bound": round(found.error_bound, 6),
        "trials": found.trials,
        "pairs": pairs,
    }


def note_result(
    plan: PruningPlan, request: ToleranceRequest, agreement: Agreement, pairs: int
) -> None:
    """Say which budget a tolerance came to, and what the holdout proves."""
    tolerance = f"{request.tolerance:.1%}"
    if plan.budget.reached >= 1.0:
        note(f"No budget is within a tolerance of {tolerance}: nothing is pruned.")
        return
    note(
        f"The smallest budget within a tolerance of {tolerance} is {plan.budget.reached:.1%}: "
        f"{agreement.share:.2%} of {agreement.trials} {request.tolerance_on} agree on {pairs} "
        f"holdout pairs, so that the error is at most {agreement.error_bound:.1%} (95 % "
        "confidence)."
    )
