"""Visual layer drop: the layers in which text reads the image at all."""

from __future__ import annotations

import torch


def select_readers(cross_modal: torch.Tensor, count: int) -> list[int]:
    """The layers whose text queries put most attention on the image.

    Args:
        cross_modal: (layers,) mean visual mass.
        count: Number of layers.

    Returns:
        Their indices, ascending.
    """
    best = torch.argsort(cross_modal.double(), descending=True, stable=True)[:count]
    return sorted(best.tolist())
