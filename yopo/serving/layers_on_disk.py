"""Whether a decoder's layers stay in the checkpoint's files: where the weights do not fit.

And which of these layers the system keeps in memory.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from yopo.checkpoint.reader import Checkpoint
from yopo.models.devices import free_memory
from yopo.models.offloaded import after_use, layers_on_disk
from yopo.models.registry import family_of
from yopo.support.console import note
from yopo.support.memory import available_bytes
from yopo.support.ranks import is_together, least

Offload = Literal["auto", "never", "always"]
"""When layers stay on disk; ``auto``: where the weights do not fit the device's free memory."""

SHARE = 0.9
"""Part of the free memory that weights may fill."""

CACHED = 0.75
"""Part of the free memory that the system may keep pages of layers in; states of pairs that wait
take what is left."""

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
    return layers_on_disk(model, model.get_decoder(), device, towers=offload == "always")


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
