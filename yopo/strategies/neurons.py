"""Sparse visual projection: FFN neurons that matter little to visual tokens."""

from __future__ import annotations

import torch


def select_widths(importance: torch.Tensor, count: int, layers: list[int]) -> list[int]:
    """Spread a total number of neurons over layers so that most importance is kept.

    Within a layer neurons are used in order of importance; across layers the shares of a layer's
    own importance compete, since layers differ in scale.

    Args:
        importance: (layers, neurons), non-negative.
        count: Neurons to keep in total.
        layers: Layers that may have any.

    Returns:
        Kept neurons of every layer (0 where it may have none), ``count`` or all in total.
    """
    widths = [0] * importance.shape[0]
    if not layers or count <= 0:
        return widths
    share = importance[layers].double()
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-30)
    best = torch.argsort(share.flatten(), descending=True, stable=True)[:count]
    owners = torch.bincount(best // share.shape[1], minlength=len(layers))
    for layer, width in zip(layers, owners.tolist(), strict=True):
        widths[layer] = width
    return widths


def uniform_widths(num_neurons: int, ratio: float, layers: list[int], total: int) -> list[int]:
    """The paper's form: the same share of neurons in every visual layer."""
    return [round(num_neurons * ratio) if layer in layers else 0 for layer in range(total)]
