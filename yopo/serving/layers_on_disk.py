"""Whether a decoder's layers stay in the checkpoint's files: where the weights do not fit."""

from __future__ import annotations

from typing import Any, Literal

import torch

from yopo.checkpoint.reader import Checkpoint
from yopo.models.devices import free_memory
from yopo.models.offloaded import layers_on_disk
from yopo.serving.weight_sizes import WeightSizes, loaded_dtype, on_meta
from yopo.support.console import note, warn
from yopo.support.errors import ModelError
from yopo.support.launched import processes_here
from yopo.support.out_of_memory import narrower, use

Offload = Literal["auto", "never", "always"]
"""When layers stay on disk; ``auto``: where the weights do not fit the device's free memory."""

SHARE = 0.9
"""Part of the free memory that weights may fill."""

OFFLOAD = "--offload always (yopo calibrate)"

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

    Raises:
        ModelError: What would be in memory does not fit the device's free memory.
    """
    model = on_meta(checkpoint.config)
    sizes = WeightSizes.of(model, loaded_dtype(dtype, checkpoint.config))
    free = free_here(torch.device(device))
    fits = free is None or sizes.num_bytes <= free * SHARE
    if offload == "never" or (offload == "auto" and fits):
        if free is not None and sizes.num_bytes > free:
            is_mapped = device == "cpu" and sizes.dtype == loaded_dtype("auto", checkpoint.config)
            _say_too_large(sizes, free, device, is_mapped=is_mapped)
        return None
    if free is not None and sizes.least_bytes > free:
        raise ModelError(
            f"{sizes.least_bytes / _GB:.3g} GB of weights have to be in memory even if decoder "
            f"layers are on disk, and {free / _GB:.3g} GB are free on {device}.",
            remedy=use(narrower(sizes.itemsize), "another --device", "--device-map auto"),
        )
    room = "" if free is None else f", {free / _GB:.3g} GB free on {device}"
    note(
        f"{sizes.num_bytes / _GB:.3g} GB of weights{room}: decoder layers "
        "are read from the checkpoint one at a time (--offload)."
    )
    return layers_on_disk(model, model.get_decoder(), device)


def free_here(device: torch.device) -> int | None:
    """What one process may take of a device's free memory; processes share that of their host."""
    free = free_memory(device)
    return free if free is None or device.type == "cuda" else free // processes_here()


def _say_too_large(sizes: WeightSizes, free: int, device: str, *, is_mapped: bool) -> None:
    """Refuse weights that do not fit, or warn where the system can read them again and again."""
    what = f"{sizes.num_bytes / _GB:.3g} GB of weights do not fit {free / _GB:.3g} GB free on "
    remedy = use(OFFLOAD, narrower(sizes.itemsize), "another --device", "--device-map auto")
    if not is_mapped:
        raise ModelError(f"{what}{device}.", remedy=remedy)
    warn(f"{what}{device}: they are read from their files over and over. {remedy}")
