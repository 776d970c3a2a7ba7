"""The template ``paper`` ranks heads by the median of rho, the paper's own rules by its mean."""

from __future__ import annotations

from dataclasses import replace

import statistics_maker
import torch

from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest, PaperRequest

LAYER, HEAD = 3, 5


def readers(request: PaperRequest | BudgetRequest) -> tuple[int, ...]:
    """Reading heads of the layer whose head reads the image in one sample alone, beyond measure."""
    statistics = statistics_maker.make(samples=9)
    rho = statistics.rho.clone()
    rho[:, LAYER, HEAD] = torch.tensor([9514.0, *[0.0] * 8])
    plan, _ = make_plan(replace(statistics, rho=rho), request)
    return plan.layers[LAYER].read_heads


def test_one_sample_rules_the_papers_shape_but_not_the_template() -> None:
    assert HEAD in readers(PaperRequest(head_ratio=0.25, neuron_ratio=0.25))
    kept = readers(BudgetRequest(0.2, template="paper"))
    assert 0 < len(kept) < 8 and HEAD not in kept
