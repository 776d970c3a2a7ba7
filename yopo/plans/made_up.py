"""Plans of a shape alone: which heads and neurons they keep was not measured.

Time depends on how many are kept, so such a plan can be timed; applied to a checkpoint it would
prune at random.
"""

from __future__ import annotations

from yopo.plans.schema import PruningPlan
from yopo.support.errors import PlanError

MADE_UP = "0" * 64
"""Fingerprint of models without a checkpoint."""


def refuse_made_up(plan: PruningPlan) -> None:
    """Raise PlanError if a plan was made from a shape alone."""
    if plan.model.fingerprint == MADE_UP:
        raise PlanError(
            f"The plan was made from the shape of {plan.model.name} alone: its heads and neurons "
            "were not chosen by measurement, so it can be timed but not applied to a model.",
            remedy="Time it with `yopo bench PLAN --random-weights`; make one to apply with `yopo "
            "calibrate`.",
        )
