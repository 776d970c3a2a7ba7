"""The paper's shape: a cut, a share of the heads, a share of the neurons, a neighborhood."""

from __future__ import annotations

from collections.abc import Callable

import torch

from yopo.calibration.statistics import Statistics
from yopo.planning.request import PaperRequest
from yopo.plans.schema import LayerPlan, ModelShape
from yopo.strategies import heads as head_strategy

Score = Callable[[torch.Tensor], torch.Tensor]
"""Activity per sample, (samples, layers, heads), to one number per head, (layers, heads)."""

EMPTY = LayerPlan((), attend_heads=(), radius=None, neurons=0)


def paper_layers(
    shape: ModelShape,
    rho: torch.Tensor,
    *,
    visual_layers: int,
    head_ratio: float,
    neuron_ratio: float,
    radius: int | None,
    alpha: float | None = None,
    groups: int = 1,
    score: Score = head_strategy.score,
) -> tuple[LayerPlan, ...]:
    """Build the paper's shape from head activity.

    Args:
        shape: The decoder's dimensions.
        rho: (samples, layers, heads) activity.
        visual_layers: First layers that see visual tokens.
        head_ratio: Share of their heads to keep, chosen over all of them, most active first.
        neuron_ratio: Share of their neurons to keep, the same in every layer.
        radius: Neighborhood of visual queries.
        alpha: Select heads by the authors' vote instead of by ratio.
        groups: Number of query heads kept or dropped together (a KV head's, or 1).
        score: By which heads are chosen by ratio; the paper's is the mean.

    Returns:
        One entry per layer.
    """
    seen = rho[:, :visual_layers]
    if alpha is not None:
        keep = head_strategy.select_vote(seen, alpha, groups=groups)
    else:
        count = round(head_ratio * visual_layers * shape.heads)
        whole = head_strategy.WHOLE_LAYERS if head_ratio < 1 else 0
        keep = head_strategy.select_top(score(seen), count, whole_layers=whole, groups=groups)
    width = round(shape.ffn * neuron_ratio)
    layers = [
        LayerPlan(kept, kept, radius=radius if kept else None, neurons=width)
        for kept in map(kept_heads, keep)
    ]
    return (*layers, *(EMPTY,) * (shape.layers - visual_layers))


def kept_heads(row: torch.Tensor) -> tuple[int, ...]:
    """Indices of a (heads,) bool row."""
    return tuple(row.nonzero().flatten().tolist())


def requested_layers(statistics: Statistics, request: PaperRequest) -> tuple[LayerPlan, ...]:
    """The layers that a request describes, from a calibration's head activity."""
    shape = statistics.model.shape
    return paper_layers(
        shape,
        statistics.rho,
        visual_layers=request.num_visual_layers(shape),
        head_ratio=request.ratio("head_ratio"),
        neuron_ratio=request.ratio("neuron_ratio"),
        radius=request.radius_or_default,
        alpha=request.alpha,
        groups=request.group(shape),
    )
