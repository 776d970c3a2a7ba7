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
    """Sizes of prompts.

    Attributes:
        longest, mean: Tokens of one.
        visual, most_visual: Visual tokens of one: mean and largest number.
        pixels, most_pixels: Numbers that its images take as the tower's input, likewise.
        patches, most_patches: The tower's patches, likewise.
        seconds: To process one on the host.
    """

    longest: int
    mean: float
    visual: float
    most_visual: int
    pixels: float
    most_pixels: int
    patches: float
    most_patches: int
    seconds: float

    def reduced(self, keep: float) -> Prompts:
        """With a share of the visual tokens in the decoder."""
        dropped, most = (1 - keep) * self.visual, round((1 - keep) * self.most_visual)
        return replace(
            self,
            longest=self.longest - most,
            mean=self.mean - dropped,
            visual=self.visual - dropped,
            most_visual=self.most_visual - most,
        )


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        width, ffn, layers: Its dimensions.
        patch: Numbers of the input that make a patch.
    """

    width: int
    ffn: int
    layers: int
    patch: int


@dataclass(frozen=True)
class Counts:
    """Pairs by purpose, of all processes together; see ``yopo.data.split.Split``."""

    statistics: int = 0
    fit: int = 0
    comparison: int = 0
    holdout: int = 0


@dataclass(frozen=True)
class PlanCounts:
    """Plans that are tried, at most.

    Attributes:
        fitted: Those whose weights are fitted.
        walks: Walks that do so, ``TOGETHER`` plans in each at most.
        together: Most plans whose fitted weights are in memory at a time.
        compared: Those that are compared with the dense model.
        held_out: Those that are compared on the holdout.
        budget: The largest of their visual budgets.
        profiles: Whether the model is profiled.
        answered: Those that answer pairs themselves.
        timed: Prefills of a batch that are timed.
    """

    fitted: int = 0
    walks: int = 0
    together: int = 0
    compared: int = 0
    held_out: int = 0
    budget: float = UNKNOWN_BUDGET
    profiles: bool = False
    answered: int = 0
    timed: int = 0


@dataclass(frozen=True)
class Job:
    """A calibration, or an evaluation (which has no statistics and fits nothing).

    Attributes:
        shape: The decoder's dimensions.
        vocabulary: Size of its vocabulary.
        weights: Numbers of its weights.
        tower: The vision tower.
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
    tower: Tower
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


def profile_sums(shape: ModelShape) -> int:
    """Numbers in the sums of products that a layer's profile is made of."""
    heads = shape.heads * shape.head_dim
    return shape.hidden * (shape.hidden + heads) + heads**2 + 4 * shape.hidden**2


def plans_for(requests: Sequence[PlanRequest], counts: Counts) -> PlanCounts:
    """The plans that requests lead to.

    Args:
        requests: All that are made in one calibration.
        counts: Its pairs; without any for comparison nothing is fitted or compared for a budget.
    """
    total = PlanCounts(budget=0.0)
    for each in requests:
        found = _plans_of(each, counts)
        total = PlanCounts(
            fitted=total.fitted + found.fitted,
            walks=total.walks + found.walks,
            together=max(total.together, found.together),
            compared=total.compared + found.compared,
            held_out=total.held_out + found.held_out,
            budget=max(total.budget, found.budget),
            profiles=total.profiles or found.profiles,
        )
    return total


def _plans_of(request: PlanRequest, counts: Counts) -> PlanCounts:
    if isinstance(request, PaperRequest):
        fitted = int(request.compensation == "refit")
        return PlanCounts(fitted, fitted, fitted)
    if not counts.comparison:
        return PlanCounts()
    if isinstance(request, ToleranceRequest):
        first, more = _plans_at(request.at(UNKNOWN_BUDGET)), TOLERANCE_STEPS - 1
        near = more * (NEIGHBORS + 1)  # the best weighting so far, and those near it
        return replace(
            first,
            fitted=first.fitted + near,
            walks=first.walks + more * -(-(NEIGHBORS + 1) // TOGETHER),
            compared=first.compared + near,
            held_out=TOLERANCE_STEPS,
        )
    if isinstance(request, BudgetRequest):
        return replace(_plans_at(request), budget=request.budget)
    return _plans_at(request.at(UNKNOWN_BUDGET))


def _plans_at(request: BudgetRequest) -> PlanCounts:
    """Those of one budget."""
    compared = most_plans(request)
    if request.template is not None:
        fits = request.compensation == "refit"
        return PlanCounts(int(fits), int(fits), int(fits), compared)
    if request.compensation not in (None, "refit"):
        return PlanCounts(compared=compared)
    first, search = len(VISUAL_WEIGHTS), request.search or 0
    rounds = (first, NEIGHBORS, *(GENERATION,) * GENERATIONS, *(search,) * bool(search))
    walks = sum(-(-each // TOGETHER) for each in rounds)
    return PlanCounts(sum(rounds), walks, first + 1, compared, profiles=True)
