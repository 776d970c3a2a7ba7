"""Sparse visual projection: FFN neurons that matter little to visual tokens."""

from __future__ import annotations

import torch


def rank(importance: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """Order the neurons of some layers, the most important ones first.

    Across layers, shares of a layer's total importance compete, since layers differ in scale.

    Args:
        importance: (layers, neurons), non-negative.
        layers: Layers that may have neurons; an empty list gives an empty order.

    Returns:
        (ranked neurons,) int64, each neuron's layer.
    """
    share = importance[layers].double()
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-30)
    order = torch.argsort(share.flatten(), descending=True, stable=True)
    return torch.tensor(layers, dtype=torch.int64)[order // importance.shape[1]]


def select_widths(ranked: torch.Tensor, count: int, num_layers: int) -> list[int]:
    """Spread a total number of neurons over layers so that most importance is kept.

    Within a layer neurons are used in order of importance.

    Args:
        ranked: From ``rank``.
        count: Neurons to keep in total.
        num_layers: Layers of the model.

    Returns:
        Number of kept neurons per layer (0 where it may have none), ``count`` or all in total.
    """
    return torch.bincount(ranked[:count], minlength=num_layers).tolist()
