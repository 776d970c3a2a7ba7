"""Weights that accelerate keeps elsewhere between the calls of the module that owns them."""

from __future__ import annotations

import torch
from torch import nn

from yopo.support.errors import ModelError


def parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """A module's parameter, fetched from where accelerate's ``cpu_offload`` or ``disk_offload`` put
    it; None if the module has none of that name.

    Calling the module would fetch it, too. Whoever uses a part of a weight cannot call the module.

    Raises:
        ModelError: It is on no device, and nothing says where it is.
    """
    found = getattr(module, name, None)
    if found is None or not found.is_meta:
        return found
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        stored = getattr(each, "weights_map", None)
        if stored is not None:
            return stored[name].to(each.execution_device)
    raise ModelError(
        f"The {name} of a {type(module).__name__} is on no device (meta), expected in memory.",
        remedy="Load with a device_map that keeps the decoder on real devices.",
    )
