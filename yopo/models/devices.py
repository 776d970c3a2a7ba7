"""Decoders that are spread over several devices, as accelerate's ``device_map`` does it.

A stock layer's hook moves all that the layer is given to the layer's device. The pruned decoder
calls a layer's modules and slices its weights instead, so it moves both streams, rotary positions
and masks itself, once per boundary between devices. Keys and values stay where their layer is.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import nn

from yopo.support.memory import available_bytes


@runtime_checkable
class _Movable(Protocol):
    def to(self, device: torch.device, /) -> object: ...


Value = TypeVar("Value")


def moved(value: Value, device: torch.device) -> Value:
    """Tensors, or whatever has ``to``, on a device, also inside tuples; None stays None."""
    if isinstance(value, tuple):
        return cast("Value", tuple(moved(each, device) for each in value))
    return cast("Value", value.to(device)) if isinstance(value, _Movable) else value


def accelerate_hooks(module: nn.Module) -> tuple[object, ...]:
    """The hooks that accelerate has put around a module's forward."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: on its weights' device, or where accelerate fetches these to.

    Raises:
        ValueError: It has no weights.
    """
    for each in module.modules():
        for one in accelerate_hooks(each):
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
        for parameter in each._parameters.values():
            if parameter is not None:
                return parameter.device
    raise ValueError(f"a {type(module).__name__} has no weights")


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices that hold a model's weights, the meta device aside."""
    found = dict.fromkeys(each.device for each in model.parameters() if not each.is_meta)
    return tuple(found)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; elsewhere than on CUDA, in the host's memory.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()
