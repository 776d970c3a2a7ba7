"""Neighbor-aware attention: how far a visual token must see."""

from __future__ import annotations

import torch

PAPER_RADIUS = 2
"""The authors' 5 x 5 window."""


def select_radius(locality: torch.Tensor, share: float) -> list[int]:
    """Smallest radius per layer within which a share of the visual attention mass lies.

    Args:
        locality: (layers, distances) cumulative shares.
        share: In (0, 1].

    Returns:
        One radius per layer.
    """
    return (locality >= min(share, 1.0) - 1e-9).to(torch.uint8).argmax(dim=1).tolist()
