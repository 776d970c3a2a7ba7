"""Decoder layers whose weights accelerate keeps elsewhere between calls: on disk, in host memory.

transformers leaves offloaded weights in the checkpoint's own safetensors files, which are mapped
into memory when they are read. accelerate then fetches every module's weights in every call. Code
that runs many batches through one layer brings the layer to hand once instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import nn

from yopo.models.devices import accelerate_hooks
from yopo.support.memory import give_back
from yopo.support.out_of_memory import narrower, smaller_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AFTER_USE = "_yopo_after_use"


class _Fetching(Protocol):
    """What is used of accelerate's ``AlignDevicesHook`` with ``offload``."""

    weights_map: Mapping[str, torch.Tensor]
    execution_device: torch.device | str | int


def fetching_hook(module: nn.Module) -> _Fetching | None:
    """accelerate's hook that fetches a module's own weights; None if they are in memory."""
    for each in accelerate_hooks(module):
        if getattr(each, "weights_map", None) is not None:
            return cast("_Fetching", each)
    return None


def is_offloaded(decoder: nn.Module) -> bool:
    """Whether weights of a decoder are elsewhere between calls."""
    return any(fetching_hook(module) is not None for module in decoder.modules())


def offloaded_towers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers before a model's decoder, such as a vision tower's, whose weights are elsewhere.

    Of the outermost lists of modules, those that forwards pass one after the other.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if not isinstance(child, nn.ModuleList):
                visit(child)
            elif child is not layers:
                found.extend(each for each in child if is_offloaded(each))

    layers = model.get_decoder().layers
    visit(model)
    return found


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of a model's parameters, also of those that accelerate keeps elsewhere.

    These are read where they are, one at a time. Those on the meta device that no hook fetches are
    left out.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        hook = fetching_hook(module)
        for name, weight in module._parameters.items():
            if weight is None or id(weight) in seen or (weight.is_meta and hook is None):
                continue
            seen.add(id(weight))
            value = hook.weights_map[name] if weight.is_meta and hook is not None else weight
            yield f"{path}.{name}" if path else name, value


def offload_option(model: PreTrainedModel) -> str | None:
    """The option that leaves a model's layers on disk; None if they are there already."""
    return None if is_offloaded(model.get_decoder()) else "--offload always"


def less_memory(model: PreTrainedModel, batch_size: int) -> tuple[str | None, ...]:
    """The options that need less memory in any forward of a model, for ``memory_for``."""
    narrow = narrower(model.dtype.itemsize)
    return smaller_batches(batch_size), offload_option(model), narrow


@contextmanager
def at_hand(layer: nn.Module) -> Iterator[None]:
    """Have all weights of a layer in memory inside the block, fetched once.

    They are on the device that accelerate would run the layer on; its hooks, which would fetch them
    again, do not run. A layer that is in memory anyway is left alone, so blocks may be nested.
    """
    with ExitStack() as stack:
        if any(parameter.is_meta for parameter in layer.parameters()):
            if (call := vars(layer).get(_AFTER_USE)) is not None:
                stack.callback(call)
            stack.callback(give_back)
            files = _Files(stack)
            for module in layer.modules():
                stack.enter_context(_fetched(module, files))
        yield


def after_use(layer: nn.Module, call: Callable[[], None]) -> None:
    """Have something called whenever a layer that was brought to hand has gone away again."""
    setattr(layer, _AFTER_USE, call)


class _Files:
    """Reads weights as accelerate does, but opens each file of a layer once.

    Args:
        stack: Closes the files.
    """

    def __init__(self, stack: ExitStack):
        self._stack, self._open = stack, cast("dict[str, Any]", {})

    def read(self, weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """A weight, mapped into memory if it is in a safetensors file."""
        source: Any = weights
        key = name
        while isinstance(source, PrefixedDataset):
            source, key = source.dataset, f"{source.prefix}{key}"
        is_loader = isinstance(source, OffloadedWeightsLoader) and key not in source.state_dict
        entry = source.index[key] if is_loader else {}
        path = entry.get("safetensors_file")
        if path is None:
            return weights[name]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        found: torch.Tensor = self._open[path].get_tensor(entry.get("weight_name", key))
        return found.to(getattr(torch, entry["dtype"])) if "dtype" in entry else found


@contextmanager
def _fetched(module: nn.Module, files: _Files) -> Iterator[None]:
    """One module's own weights, without accelerate's forward around the module's."""
    hook, held = fetching_hook(module), module._parameters
    weights = {name: each for name, each in held.items() if each is not None and each.is_meta}
    wrapped = vars(module).get("forward")
    try:
        for name in weights if hook is not None else ():
            assert hook is not None, "weights are fetched by a hook"
            found = files.read(hook.weights_map, name).to(hook.execution_device)
            held[name] = nn.Parameter(found, requires_grad=False)
        if wrapped is not None and "_old_forward" in vars(module):
            module.forward = vars(module)["_old_forward"]
        yield
    finally:
        held.update(weights)
        if wrapped is not None:
            module.forward = wrapped


def layers_on_disk(
    model: nn.Module, decoder: nn.Module, device: str, *, towers: bool = False
) -> dict[str, Any]:
    """The ``device_map`` that leaves a decoder's layers on disk and puts all else on a device.

    Args:
        model: The whole model; its weights may be on the meta device.
        decoder: Its decoder, with ``layers``.
        device: For everything else, and for a layer that is at hand.
        towers: Whether the layers of what comes before the decoder, such as the vision tower's,
            stay on disk as well: accelerate fetches their modules in every call.
    """
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList), "decoders have a list of layers"
    on_disk = [
        name
        for name, module in model.named_modules()
        if module is layers or (towers and isinstance(module, nn.ModuleList))
    ]
    return _placed(model, "", on_disk, device)


def _placed(module: nn.Module, prefix: str, on_disk: list[str], device: str) -> dict[str, Any]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    places = {f"{prefix}{name}": device for name, _ in own}
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path in on_disk:
            places |= {f"{path}.{number}": "disk" for number in range(len(list(child.children())))}
        elif any(each.startswith(f"{path}.") for each in on_disk):
            places |= _placed(child, f"{path}.", on_disk, device)
        else:
            places[path] = device
    return places
