"""The known baselines. A new one is a line here and a file; torch is not loaded until it is used.

Names are used on command lines and in results; labels for tables are in the classes.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

from yopo.plans.flops import visual_budget
from yopo.support.errors import PlanError, suggest

if TYPE_CHECKING:
    from yopo.baselines.baseline import Baseline
    from yopo.plans.schema import ModelShape, PruningPlan, Workload

BASELINES: dict[str, str] = {
    "vtw": "yopo.baselines.vtw:TokenWithdrawal",
    "fastv": "yopo.baselines.fastv:FastV",
    "downsample": "yopo.baselines.downsample:Downsampling",
    "random": "yopo.baselines.random:RandomTokens",
    "par": "yopo.baselines.tokens:ParTokens",
    "divprune": "yopo.baselines.tokens:DivPruneTokens",
    "cdpruner": "yopo.baselines.tokens:CDPrunerTokens",
    "scope": "yopo.baselines.tokens:ScopeTokens",
    "prumerge": "yopo.baselines.tokens:PruMergeTokens",
    "prumerge+": "yopo.baselines.tokens:PruMergePlusTokens",
    "folder": "yopo.baselines.tokens:FolderTokens",
    "grid": "yopo.baselines.tokens:GridTokens",
    "masked": "yopo.baselines.masked:MaskedPlan",
}
"""Name -> location of its class, in the order of tables."""


def baseline_class(name: str) -> type[Baseline]:
    """The class of a baseline.

    Raises:
        PlanError: No such baseline; suggests the closest names.
    """
    if name not in BASELINES:
        raise PlanError(f"Unknown baseline '{name}'.", remedy=suggest(name, BASELINES))
    return resolve_name(BASELINES[name])


def with_own_budget() -> dict[str, type[Baseline]]:
    """The baselines that meet a budget by themselves; the others demonstrate a given plan."""
    classes = {name: baseline_class(name) for name in BASELINES}
    return {name: each for name, each in classes.items() if not each.needs_plan}


def solve(name: str, shape: ModelShape, workload: Workload, budget: float) -> Baseline:
    """A baseline with the parameters that come closest to a visual budget from below.

    Args:
        name: One of ``BASELINES``; one that demonstrates a plan ignores the budget.
        shape: The decoder's dimensions.
        workload: The prompt that the budget is solved for.
        budget: Visual FLOPs over the dense model's, in (0, 1].

    Raises:
        PlanError: No such baseline, or its cheapest choice is above the budget.
    """
    chosen = baseline_class(name)
    if not 0 < budget <= 1:
        raise PlanError(f"A visual budget must be in (0, 1], found {budget:g}.")
    return chosen.solve(shape, workload, budget)


def solve_for(name: str, plan: PruningPlan, budget: float | None = None) -> Baseline:
    """A baseline at a plan's visual budget (or another one) on the plan's own prompt."""
    budget = visual_budget(plan) if budget is None else budget
    return solve(name, plan.model.shape, plan.workload, budget)
