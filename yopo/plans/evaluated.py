"""The result of ``yopo eval --json``, recorded in the plan that it is about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yopo.plans.file import BUDGET_DIGITS
from yopo.plans.flops import visual_budget
from yopo.plans.quality import marks
from yopo.plans.schema import PruningPlan
from yopo.support.errors import PlanError
from yopo.support.reading import read_bytes

FORMAT_VERSION = 1
"""Value of ``yopo_evaluation`` in an evaluation's JSON."""

MAX_BYTES = 64 << 20
"""Maximum size of an evaluation's JSON."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found, on pairs that the user chose.

    Attributes:
        pairs: How many pairs.
        kl: Logit KL per answer token, in nats.
        same_answers: Pairs with identical generated answers.
        dense, pruned, answered: Right answers of the dense and of the pruned model, among the pairs
            with an accepted answer; all 0 if none has one.
    """

    pairs: int
    kl: float
    same_answers: int
    dense: int = 0
    pruned: int = 0
    answered: int = 0


def with_evaluation(plan: PruningPlan, path: str | Path) -> PruningPlan:
    """A plan that records an evaluation of it.

    Args:
        plan: The evaluated plan.
        path: The output of ``yopo eval --json``.

    Raises:
        PlanError: The file holds no evaluation, or one of another plan.
    """
    remedy = "Write it with `yopo eval PLAN --json > FILE`."
    try:
        document = json.loads(read_bytes(Path(path), limit=MAX_BYTES, error=PlanError))
        found = _read(document)
        model, budget = document["model"], float(document["visual_budget"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: holds no evaluation of a plan.", remedy=remedy) from error
    if not is_of(plan, model, budget):
        raise PlanError(
            f"{path}: evaluates a plan for {model} at {budget:.2%} of the visual FLOPs, but this "
            f"one is for {plan.model.name} at {visual_budget(plan):.2%}.",
            remedy=remedy,
        )
    entry = {**vars(found), "of": marks(plan)}
    return replace(plan, provenance={**plan.provenance, "evaluated": entry})


def is_of(plan: PruningPlan, model: str, budget: float) -> bool:
    """Whether an evaluation of a model at a visual budget is of this plan."""
    is_near = abs(budget - visual_budget(plan)) <= 10**-BUDGET_DIGITS
    return model == plan.model.name and is_near


def evaluated_of(plan: PruningPlan) -> Evaluated | None:
    """The evaluation that a plan records; None if it has none, or was edited since."""
    entry = plan.provenance.get("evaluated")
    if not isinstance(entry, Mapping) or entry.get("of") != marks(plan):
        return None
    try:
        return Evaluated(
            kl=float(entry["kl"]),
            **{name: int(entry[name]) for name in Evaluated.__annotations__ if name != "kl"},
        )
    except (KeyError, TypeError, ValueError):
        return None


def _read(document: Any) -> Evaluated:
    right = document["accuracy"] or {"dense": 0, "pruned": 0, "total": 0}
    return Evaluated(
        pairs=int(document["pairs"]),
        kl=float(f"{float(document['kl']):.4g}"),
        same_answers=int(document["same_answers"]),
        dense=int(right["dense"]),
        pruned=int(right["pruned"]),
        answered=int(right["total"]),
    )
