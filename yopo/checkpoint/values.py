"""Checks the values of a checkpoint's tensors for NaN while they are copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from yopo.checkpoint.headers import FLOATS, TensorEntry
from yopo.support.errors import CheckpointError
from yopo.support.finite import is_finite


def check_values(data: np.ndarray, entry: TensorEntry, path: Path) -> None:
    """Refuse values that are not finite; types other than float pass.

    Args:
        data: (bytes,) uint8, whole numbers of a tensor, in any order.
        entry: The tensor.
        path: Its file.

    Raises:
        CheckpointError: Names file and tensor.
    """
    dtype = FLOATS.get(entry.dtype)
    if dtype is None or not data.size or is_finite(torch.from_numpy(data).view(dtype)):
        return
    raise CheckpointError(
        f"{path}: tensor '{entry.name}' holds values that are not finite (NaN or infinity).",
        remedy="The checkpoint is damaged, or its training diverged; no plan can fix that.",
    )
