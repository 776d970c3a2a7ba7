"""What a request may ask for where a reduction drops visual tokens before the first layer."""

from __future__ import annotations

from yopo.calibration.statistics import Statistics
from yopo.planning.request import BudgetRequest, LatencyRequest, PaperRequest, PlanRequest
from yopo.planning.templates import NEARBY
from yopo.plans.flops import dense_visual_flops, flops_of_reduction
from yopo.plans.schema import reduction_problem
from yopo.reduction.method import Method
from yopo.support.errors import PlanError


def check_reduction(reduction: Method | None, request: PlanRequest) -> None:
    """Check that a request and a reduction go together, before anything is measured.

    Raises:
        PlanError: They do not.
    """
    if reduction is None:
        return
    problem = reduction_problem(reduction)
    if problem is not None:
        raise PlanError(f"{'.'.join(problem[0])} {problem[1]}.", remedy="Use another method.")
    if request.engine is not None:
        raise PlanError(
            f"A plan that reduces visual tokens ({reduction.name}) cannot be served in "
            f"{request.engine}, where all of them have slots.",
            remedy="Leave out the reduction or the engine.",
        )
    near = None
    if isinstance(request, PaperRequest) and request.radius_or_default is not None:
        near = f"A radius of {request.radius_or_default}"
    elif isinstance(request, BudgetRequest | LatencyRequest) and request.template in NEARBY:
        near = f"Template {request.template}"
    if near is not None:
        raise PlanError(
            f"{near} needs the neighbors of visual tokens, and a reduction ({reduction.name}) may "
            "have dropped them.",
            remedy="Give a budget without a template, or leave out the reduction.",
        )


def check_request(statistics: Statistics, request: BudgetRequest | PaperRequest) -> None:
    """Check that a request and the statistics' reduction go together.

    Raises:
        PlanError: They do not, or the reduction alone exceeds the budget.
    """
    reduction, shape, workload = statistics.reduction, statistics.model.shape, statistics.workload
    check_reduction(reduction, request)
    if reduction is None or not isinstance(request, BudgetRequest):
        return
    share = flops_of_reduction(reduction, shape, workload) / dense_visual_flops(shape, workload)
    if share >= request.budget:
        raise PlanError(
            f"No plan with {reduction.name} fits a visual budget of {request.budget}: the "
            f"reduction alone costs {share:.4f}.",
            remedy="Use a larger budget, or a method without a similarity of all pairs.",
        )
