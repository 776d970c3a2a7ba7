"""A budget in milliseconds as one in FLOPs, by what a machine was measured to take."""

from __future__ import annotations

from yopo.bench.costs import read_costs
from yopo.calibration.statistics import Statistics
from yopo.planning.request import BudgetRequest, LatencyRequest, PaperRequest
from yopo.support.console import note


def in_flops(
    request: BudgetRequest | PaperRequest | LatencyRequest, statistics: Statistics
) -> BudgetRequest | PaperRequest:
    """The request with a budget in milliseconds converted to one in FLOPs.

    Args:
        request: The request; others are returned as they are.
        statistics: Of the model that it is for.

    Raises:
        YopoError: The costs cannot be read, are another model's, or allow no budget.
    """
    if not isinstance(request, LatencyRequest):
        return request
    model, workload = statistics.model, statistics.workload
    costs = read_costs(request.costs, model.shape)
    budget = costs.budget(request.milliseconds, model.shape, workload)
    time = f"{request.milliseconds:g} ms"
    note(f"{time} correspond to a visual budget of {budget:.1%} according to {request.costs}.")
    return request.at(budget)
