"""Whether a decoder's layers stay in the checkpoint's files: where the weights do not fit."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import transformers

from yopo.checkpoint.reader import Checkpoint
from yopo.models.devices import free_memory
from yopo.models.offloaded import layers_on_disk
from yopo.models.registry import family_of
from yopo.support.console import note
from yopo.support.ranks import least

Offload = Literal["auto", "never", "always"]
"""When layers stay on disk; ``auto``: where the weights do not fit the device's free memory."""

SHARE = 0.9
"""Part of the free memory that weights may fill."""

_GB = 1e9


def map_for(
    checkpoint: Checkpoint, dtype: torch.dtype | str, device: str, offload: Offload
) -> dict[str, Any] | None:
    """The ``device_map`` that leaves decoder layers on disk, or None if they are to be in memory.

    Args:
        checkpoint: The model's files.
        dtype: What weights are loaded as; ``auto``: as they are stored.
        device: Where everything else goes, and where layers run.
        offload: When.
    """
    if offload == "never":
        return None
    config = copy.deepcopy(checkpoint.config)
    with torch.device("meta"):
        model = getattr(transformers, family_of(config).architecture)(config)
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None)
    size = kind.itemsize if isinstance(kind, torch.dtype) else torch.float32.itemsize
    needed = sum(each.numel() for each in model.parameters()) * size
    free = least(free_memory(torch.device(device)))
    if offload == "auto" and (free is None or needed <= free * SHARE):
        return None
    room = "" if free is None else f", {free / _GB:.3g} GB free on {device}"
    note(
        f"{needed / _GB:.3g} GB of weights{room}: decoder layers "
        "are read from the checkpoint one at a time (--offload)."
    )
    return layers_on_disk(model, model.get_decoder(), device)
