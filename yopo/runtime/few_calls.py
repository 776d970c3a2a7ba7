"""Where few calls of large operations are better than many of small ones."""

from __future__ import annotations

import torch


def preferred_on(device: torch.device) -> bool:
    """Whether starting an operation costs more than doing it for a few rows more.

    At the size of one prompt a GPU spends more time on starting kernels than on their work; on a
    CPU large temporaries cost more than calls.
    """
    return device.type != "cpu"
