"""Whether a decoder's layers stay in the checkpoint's files: where the weights do not fit."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from yopo.checkpoint.reader import Checkpoint
from yopo.models.offloaded import layers_on_disk
from yopo.models.registry import family_of
from yopo.support.console import note

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
    free = free_memory(torch.device(device))
    if offload == "auto" and needed <= free * SHARE:
        return None
    note(
        f"{needed / _GB:.3g} GB of weights, {free / _GB:.3g} GB free on {device}: decoder layers "
        "are read from the checkpoint one at a time (--offload)."
    )
    return layers_on_disk(model, model.get_decoder(), device)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device; elsewhere than on CUDA, in the host's memory.

    Memory that the system uses to cache files counts as free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        kilobytes = next(line for line in lines if line.startswith("MemAvailable:")).split()[1]
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(kilobytes) * 1024
