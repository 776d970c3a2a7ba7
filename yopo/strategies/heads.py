"""Inactive visual heads: query heads that barely read the image (the paper's Section 3.3)."""

from __future__ import annotations

import torch

WHOLE_LAYERS = 2
"""The authors keep every head of the first two layers."""

VOTE_SHARE = 0.4
"""The authors' vote: active if ``rho > alpha`` in more than 40 of 100 samples."""


def score(rho: torch.Tensor) -> torch.Tensor:
    """Mean activity of every head.

    Args:
        rho: (samples, layers, heads).

    Returns:
        (layers, heads); higher means that the head reads the image more.
    """
    return rho.mean(dim=0)


def select_vote(
    rho: torch.Tensor,
    alpha: float,
    *,
    share: float = VOTE_SHARE,
    whole_layers: int = WHOLE_LAYERS,
    groups: int = 1,
) -> torch.Tensor:
    """The authors' rule: keep a head if it is active in more than a share of the samples.

    Args:
        rho: (samples, layers, heads).
        alpha: Activity above which a head counts as active in a sample.
        share: Share of samples that must agree.
        whole_layers: Number of first layers that keep every head.
        groups: Query heads per KV head that are kept or dropped together (1: single query heads);
            one active head keeps its group.

    Returns:
        (layers, heads) bool.
    """
    keep = (rho > alpha).float().mean(dim=0) > share
    keep[:whole_layers] = True
    return keep.unflatten(1, (-1, groups)).any(dim=2).repeat_interleave(groups, dim=1)


def select_top(
    scores: torch.Tensor, count: int, *, whole_layers: int = 0, groups: int = 1
) -> torch.Tensor:
    """Keep the ``count`` highest-scoring heads over all layers.

    Args:
        scores: (layers, heads).
        count: Heads to keep in total.
        whole_layers: First layers that keep every head, as long as they take at most half.
        groups: Query heads per KV head that are kept or dropped together (1: single query heads).

    Returns:
        (layers, heads) bool; ties go to earlier layers and lower heads.
    """
    layers, heads = scores.shape
    whole_layers = min(whole_layers, count // (2 * heads))
    ranked = scores.double().clone()
    ranked[:whole_layers] = float("inf")
    grouped = ranked.reshape(layers * heads // groups, groups).amax(dim=1)
    best = torch.argsort(grouped, descending=True, stable=True)[: round(count / groups)]
    keep = torch.zeros_like(grouped, dtype=torch.bool)
    keep[best] = True
    return keep.repeat_interleave(groups).reshape(layers, heads)
