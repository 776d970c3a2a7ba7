"""Whether a decoder's layers stay in the checkpoint's files: where the weights do not fit.

And which of these layers the system keeps in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from yopo.checkpoint.reader import Checkpoint
from yopo.models.devices import free_memory
from yopo.models.offloaded import after_use, layers_on_disk
from yopo.serving.weight_sizes import WeightSizes, loaded_dtype, on_meta
from yopo.support.console import note, warn
from yopo.support.errors import ModelError
from yopo.support.memory import available_bytes
from yopo.support.out_of_memory import narrower, use
from yopo.support.ranks import is_together, least

Offload = Literal["auto", "never", "always"]
"""When layers stay on disk; ``auto``: where the weights do not fit the device's free memory."""

SHARE = 0.9
"""Part of the free memory that weights may fill."""

CACHED = 0.75
"""Part of the free memory that the system may keep pages of layers in; states of pairs that wait
take what is left."""

OFFLOAD = "--offload always (yopo calibrate, yopo eval)"

_GB = 1e9

Range = tuple[Path, int, int]
"""A file, and where a tensor's bytes in it begin and end."""


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
    free = least(free_memory(torch.device(device)))
    fits = free is None or sizes.num_bytes <= free * SHARE
    if offload == "never" or (offload == "auto" and fits):
        if free is not None and sizes.num_bytes > free:
            is_mapped = device == "cpu" and sizes.dtype == loaded_dtype("auto", checkpoint.config)
            _say_too_large(sizes, free, device, is_mapped=is_mapped)
        return None
    certain = sizes.resident_bytes(towers_on_disk=True)
    if free is not None and certain > free:
        raise ModelError(
            f"{certain / _GB:.3g} GB of weights have to be in memory even if layers are on disk, "
            f"and {free / _GB:.3g} GB are free on {device}.",
            remedy=use(narrower(sizes.itemsize), "another --device", "--device-map auto"),
        )
    towers = offload == "always" or (
        free is not None and sizes.resident_bytes(towers_on_disk=False) > free * SHARE
    )
    room = "" if free is None else f", {free / _GB:.3g} GB free on {device}"
    what = "decoder and vision tower layers" if towers else "decoder layers"
    note(
        f"{sizes.num_bytes / _GB:.3g} GB of weights{room}: {what} are read from the checkpoint one "
        "at a time (--offload)."
    )
    return layers_on_disk(model, model.get_decoder(), device, towers=towers)


def _say_too_large(sizes: WeightSizes, free: int, device: str, *, is_mapped: bool) -> None:
    """Refuse weights that do not fit, or warn where the system can read them again and again."""
    what = f"{sizes.num_bytes / _GB:.3g} GB of weights do not fit {free / _GB:.3g} GB free on "
    remedy = use(OFFLOAD, narrower(sizes.itemsize), "another --device", "--device-map auto")
    if not is_mapped:
        raise ModelError(f"{what}{device}.", remedy=remedy)
    warn(f"{what}{device}: they are read from their files over and over. {remedy}")


def cache_first_layers(decoder: nn.Module, checkpoint: Checkpoint) -> None:
    """Have the system keep the pages of a decoder's first layers in memory, where not all fit.

    Passes read the layers in order, again and again. Of files that do not fit, the system drops
    what was not used for longest, which is what will be needed next, so that every pass would read
    all of them. So the pages of other layers leave memory after each use. Processes that share a
    calibration share pages as well, and leave this to the system.

    Args:
        decoder: Its layers are read from the checkpoint.
        checkpoint: Its files.
    """
    free, layers = available_bytes(), decoder.layers
    assert isinstance(layers, nn.ModuleList), "decoders have a list of layers"
    if free is None or is_together() or not hasattr(os, "posix_fadvise"):
        return
    ranges: list[list[Range]] = [[] for _ in layers]
    files = {each.name: shard.file for shard in checkpoint.shards for each in shard.tensors}
    for (number, _), entry in checkpoint.decoder.items():
        ranges[number].append((checkpoint.path / files[entry.name], entry.start, entry.stop))
    room = CACHED * free
    for layer, parts in zip(layers, ranges, strict=True):
        room -= sum(stop - start for _, start, stop in parts)
        if room < 0:
            after_use(layer, partial(_drop, parts))


def _drop(parts: Sequence[Range]) -> None:
    """Let pages go that nobody else has mapped."""
    for path, start, stop in parts:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
