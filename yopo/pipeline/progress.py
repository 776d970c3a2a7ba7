"""Says which plan is being measured, of how many at most, and how long it has taken."""

from __future__ import annotations

import time

from yopo.planning.allocations import GENERATION, GENERATIONS
from yopo.planning.request import BudgetRequest
from yopo.planning.templates import TEMPLATES
from yopo.planning.weightings import VISUAL_WEIGHTS
from yopo.plans.schema import PruningPlan
from yopo.support.console import duration, step

NEIGHBORS = 3
"""Weightings near the best even one (see ``weightings.near``)."""


def most_plans(request: BudgetRequest, tried: int = 0) -> int:
    """How many plans a request measures at most, other storages of the best one left out.

    Args:
        request: The request.
        tried: Number of weightings, if only these are tried.
    """
    if tried:
        return tried
    kinds = 1 if request.compensation else 2
    templates = 0 if request.compensation == "refit" and not request.template else len(TEMPLATES)
    count = kinds * (1 if request.template else templates)
    if request.compensation in (None, "refit") and not request.template:
        count += len(VISUAL_WEIGHTS) + NEIGHBORS + GENERATIONS * GENERATION
    return count + (request.search or 0)


class PlanProgress:
    """Counts the plans of one request as they are measured.

    Args:
        most: How many there are at most.
    """

    def __init__(self, most: int):
        self._most, self._count = most, 0
        self._started = time.monotonic()

    def add(self, plan: PruningPlan, kl: float) -> None:
        """Say that a plan was measured."""
        self._count += 1
        seconds = time.monotonic() - self._started
        of = f" of at most {self._most}" if self._count <= self._most else ""
        step(
            f"plan {self._count}{of}: {plan.compensation}, visual budget "
            f"{plan.budget.reached:.1%}, logit KL {kl:.3g} ({duration(seconds)})"
        )
