"""What a command is going to do, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from yopo.fitting.fitter import TOGETHER
from yopo.pipeline.progress import NEIGHBORS, most_plans
from yopo.planning.allocations import GENERATION, GENERATIONS
from yopo.planning.request import BudgetRequest, PaperRequest, PlanRequest, ToleranceRequest
from yopo.planning.weightings import VISUAL_WEIGHTS
from yopo.plans.schema import ModelShape
from yopo.serving.weight_sizes import WeightSizes

TOLERANCE_STEPS = 6
"""Budgets that a tolerance tries: it halves the logarithm of their range until it is small."""

UNKNOWN_BUDGET = 0.25
"""Taken for requests that do not name one."""


@dataclass(frozen=True)
class Prompts:
    """Sizes of prompts, of which a reduction leaves a part to the decoder.

    Attributes:
        longest, mean: Tokens of the longest one, and of one on average.
        visual: Visual ones of these.
        patches: The vision tower's patches of its images.
        seconds: To process one on the host.
    """

    longest: float
    mean: float
    visual: float
    patches: float
    seconds: float


@dataclass(frozen=True)
class Counts:
    """Pairs by purpose, of all processes together; see ``yopo.data.split.Split``."""

    statistics: int = 0
    fit: int = 0
    comparison: int = 0
    holdout: int = 0

    @property
    def judged(self) -> int:
        """Those that the dense model answers."""
        return self.comparison + self.holdout


@dataclass(frozen=True)
class PlanCounts:
    """Plans that are tried, at most.

    Attributes:
        fitted: Those whose weights are fitted.
        compared: Those that are compared with the dense model.
        budget: The largest of their visual budgets.
        profiles: Whether the model is profiled.
        answered: Those that answer pairs themselves.
        timed: Prefills of a batch that are timed.
    """

    fitted: int = 0
    compared: int = 0
    budget: float = UNKNOWN_BUDGET
    profiles: bool = False
    answered: int = 0
    timed: int = 0

    @property
    def walks(self) -> int:
        """Walks that fit plans, several in each."""
        return -(-self.fitted // TOGETHER)

    @property
    def kept(self) -> int:
        """Most plans whose fitted weights are there at a time: the first ones, and the best."""
        return min(self.fitted, len(VISUAL_WEIGHTS) + 1)


@dataclass(frozen=True)
class Job:
    """A calibration, or an evaluation (which has no statistics and fits nothing).

    Attributes:
        shape: The decoder's dimensions.
        vocabulary: Size of its vocabulary.
        weights: Numbers of its weights.
        prompts: Sizes of prompts.
        counts: Pairs by purpose.
        plans: Plans that are tried.
        batch_size: Pairs per forward.
        new_tokens: Most tokens of an answer.
        is_offloaded: Whether decoder layers are on disk.
        has_folder: Whether there is a work directory.
        on_host: Whether the device is the host.
        staged: Bytes on the host that are there while weights are loaded, and not afterwards.
        processes: That share the work.
        window: Bytes for forwards that wait at layers on disk.
    """

    shape: ModelShape
    vocabulary: int
    weights: WeightSizes
    prompts: Prompts
    counts: Counts
    plans: PlanCounts
    batch_size: int
    new_tokens: int
    is_offloaded: bool = False
    has_folder: bool = False
    on_host: bool = True
    staged: int = 0
    processes: int = 1
    window: int = 0

    def own(self, pairs: int) -> int:
        """Of some pairs, at most those of one process."""
        batches = -(-pairs // self.batch_size)
        return min(pairs, -(-batches // self.processes) * self.batch_size)


def plans_for(requests: Sequence[PlanRequest], counts: Counts) -> PlanCounts:
    """The plans that requests lead to.

    Args:
        requests: All that are made in one calibration.
        counts: Its pairs; without any for comparison nothing is fitted or compared for a budget.
    """
    found = [_plans_of(each, counts) for each in requests]
    return PlanCounts(
        fitted=sum(each.fitted for each in found),
        compared=sum(each.compared for each in found),
        budget=max((each.budget for each in found), default=0.0),
        profiles=any(each.profiles for each in found),
    )


def _plans_of(request: PlanRequest, counts: Counts) -> PlanCounts:
    if isinstance(request, PaperRequest):
        return PlanCounts(fitted=int(request.compensation == "refit"))
    if not counts.comparison:
        return PlanCounts()
    if isinstance(request, BudgetRequest):
        return _plans_at(request)
    found = _plans_at(request.at(UNKNOWN_BUDGET))
    if isinstance(request, ToleranceRequest):
        near = (TOLERANCE_STEPS - 1) * (NEIGHBORS + 1)  # the best weighting so far, and others
        found = replace(found, fitted=found.fitted + near, compared=found.compared + near)
    return found


def _plans_at(request: BudgetRequest) -> PlanCounts:
    """Those of one budget."""
    compared, fits = most_plans(request), request.compensation == "refit"
    if request.template is not None or request.compensation not in (None, "refit"):
        return PlanCounts(int(fits), compared, request.budget)
    allocations = len(VISUAL_WEIGHTS) + NEIGHBORS + GENERATION * GENERATIONS
    fitted = allocations + (request.search or 0)
    return PlanCounts(fitted, compared, request.budget, profiles=True)
