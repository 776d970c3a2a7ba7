"""A plan that was considered, and how far it strays from the dense model."""

from __future__ import annotations

from dataclasses import dataclass

from yopo.planning.kv_budget import Storage
from yopo.planning.weightings import Weighting
from yopo.plans.schema import PruningPlan


@dataclass(frozen=True)
class Candidate:
    """A plan at the budget and its divergence from the dense model.

    Attributes:
        template: Name in ``TEMPLATES``, or how the budget was allocated.
        compensation: ``none``, ``mean`` or ``refit``.
        plan: The plan. Of all allocations only the best has its fitted weights in memory.
        kl: Logit KL to the dense model, per answer token; None if not measured.
        weighting: The weighting of the allocation, if it is one.
        storage: How visual keys and values are stored; None: in the finest way that needs no head
            dropped.
    """

    template: str
    compensation: str
    plan: PruningPlan
    kl: float | None
    weighting: Weighting | None = None
    storage: Storage | None = None


def kl_of(candidate: Candidate) -> float:
    """The sort key of candidates: all of them are measured, or none."""
    assert candidate.kl is not None, "candidates are sorted only if they are measured"
    return candidate.kl
