"""Weights that accelerate keeps elsewhere between calls of the module that owns them."""

from __future__ import annotations

import torch
from torch import nn

from yopo.models.offloaded import fetching_hook
from yopo.support.errors import ModelError


def weight_of(module: nn.Module) -> torch.Tensor:
    """A module's weight, fetched from where accelerate's ``cpu_`` or ``disk_offload`` put it.

    Calling the module would fetch it, too, but code that uses a part of a weight cannot call it.

    Raises:
        ModelError: It is on the meta device without an offload hook, or there is none.
    """
    found = _parameter(module, "weight")
    if found is None:
        raise ModelError(f"A {type(module).__name__} has no weight, expected a linear layer.")
    return found


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """A module's bias, fetched in the same way; None if it has none."""
    return _parameter(module, "bias")


def _parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    found = getattr(module, name, None)
    if found is None or not found.is_meta:
        return found
    hook = fetching_hook(module)
    if hook is not None:
        return hook.weights_map[name].to(hook.execution_device)
    raise ModelError(
        f"The {name} of a {type(module).__name__} is on the meta device, expected in memory.",
        remedy="Load with a device_map that keeps the decoder on real devices.",
    )


def is_fetched(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere and fetches them when they are used."""
    return fetching_hook(module) is not None
