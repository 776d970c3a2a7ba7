"""Devices that a machine does not have: tensors in main memory that say they are elsewhere.

Inside :func:`pretended`, ``cuda:0`` and ``cuda:1`` are names that tensors carry. Numbers are
computed on the CPU, so results can be compared bit by bit, but an operation on tensors of different
devices fails as it would on real ones. Modules, factories, ``to`` and accelerate's hooks take the
names as they take any.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import accelerate
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

CPU = torch.device("cpu")

_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::set_", "aten::lift_fresh")


class MixedDevicesError(RuntimeError):
    """Tensors of several devices met in one operation."""


class Places:
    """Where tensors pretend to be; those that nothing is known of are on the CPU.

    Attributes:
        moves: From, to and shape of every tensor that changed its device.
    """

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._memory: dict[int, torch.device] = {}
        self.moves: list[tuple[str, str, tuple[int, ...]]] = []

    def __getitem__(self, tensor: torch.Tensor) -> torch.device:
        known = self._known.get(tensor)
        if known is None and isinstance(tensor, torch.nn.Parameter):
            # torch makes parameters of tensors without saying so.
            known = self._memory.get(_memory(tensor))
        return known or CPU

    def on(self, place: torch.device) -> list[torch.Tensor]:
        """The tensors on a device that somebody holds."""
        return [each for each, where in self._known.items() if where == place]

    def __setitem__(self, tensor: torch.Tensor, place: torch.device) -> None:
        self._known[tensor] = place
        self._memory[_memory(tensor)] = place


def _memory(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.data_ptr()


def _tensors(values: object) -> list[torch.Tensor]:
    """The tensors in arguments or results of an operation."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


class _Operations(TorchDispatchMode):
    """Refuses operations on several devices; results are where the operands are."""

    def __init__(self, places: Places):
        super().__init__()
        self._places = places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _tensors((args, kwargs))
        checked = given
        if func._schema.name in _INDEXED:  # by indices on the CPU or on the same device
            at_home = [each for each in _tensors(args[1]) if self._places[each] == CPU]
            checked = [each for each in given if not any(each is one for one in at_home)]
        found_at = ((each, self._places[each]) for each in checked)
        places = {place for each, place in found_at if each.dim() or place != CPU}
        if len(places) > 1 and func._schema.name not in _MAY_MIX:
            raise MixedDevicesError(f"{func} on {sorted(map(str, places))}")
        found = func(*args, **(kwargs or {}))
        place = self._places[given[0]] if len(places) != 1 and given else None
        place = next(iter(places), CPU) if place is None else place
        for each in _tensors(found):
            if not any(each is one for one in given):
                self._places[each] = place
        return found


class _Names(TorchFunctionMode):
    """Gives ``tensor.device``, ``to`` and factories their pretended devices."""

    def __init__(self, places: Places):
        super().__init__()
        self._places = places

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return self._places[args[0]]
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._moved(func, args, kwargs)
        if func is torch.device:
            return _device(args[0]) if args and len(args) == 1 else func(*args, **kwargs)
        place = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        if place is None:
            found = func(*args, **kwargs)
            if func is torch.Tensor.data.__get__ or func is torch.Tensor.detach:
                self._places[found] = self._places[args[0]]
            return found
        found = func(*args, **kwargs)
        for each in _tensors(found):
            self._places[each] = _device(place)
        return found

    def _moved(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
        tensor, rest = args[0], list(args[1:])
        own = self._places[tensor]
        place = own
        if func is torch.Tensor.cpu:
            place = CPU
        elif func is torch.Tensor.cuda:
            place = torch.device("cuda", 0)
        elif "device" in kwargs:
            given = kwargs.pop("device")
            place = own if given is None else _device(given)
        elif rest and isinstance(rest[0], torch.Tensor):
            place, rest[0] = self._places[rest[0]], rest[0].dtype
        elif rest and isinstance(rest[0], (str, int, torch.device)):
            place = _device(rest.pop(0))
        elif rest and rest[0] is None:
            rest.pop(0)
        kwargs.pop("non_blocking", None)
        rest = [each for each in rest if each is not None]
        found = torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if place == own:
            self._places[found] = own
            return found
        found = found.clone() if found is tensor else found
        self._places.moves.append((str(own), str(place), tuple(tensor.shape)))
        self._places[found] = place
        return found


def _device(given: Any) -> torch.device:
    with torch._C.DisableTorchFunction():
        place = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
        return torch.device("cuda", 0) if place == torch.device("cuda") else place


@contextmanager
def pretended() -> Iterator[Places]:
    """A block in which ``cuda:0`` and ``cuda:1`` can be used; yields where tensors are."""
    places = Places()
    with _Names(places), _Operations(places):
        yield places


def device_map(model: PreTrainedModel, *devices: Any) -> dict[str, Any]:
    """The decoder's layers dealt out to devices in equal parts; what is before and after them on
    the first and the last."""
    decoder = model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    layers = [names[id(layer)] for layer in decoder.layers]
    found = {
        name: devices[number * len(devices) // len(layers)] for number, name in enumerate(layers)
    }
    found[names[id(decoder.norm)]] = devices[-1]
    head = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        is_above = any(other.startswith(f"{name}.") or not name for other in found)
        if not is_above and not any(f"{name}.".startswith(f"{other}.") for other in found):
            found[name] = devices[-1] if module is head and not is_tied else devices[0]
    covered = tuple(f"{name}." for name in found)
    alone = [name for name, _ in model.named_parameters() if not name.startswith(covered)]
    return found | dict.fromkeys(alone, devices[0])


def spread(model: PreTrainedModel, *devices: Any) -> PreTrainedModel:
    """A copy of a model whose decoder is spread over devices as ``device_map`` does it."""
    places = device_map(model, *devices)
    return accelerate.dispatch_model(
        copy.deepcopy(model),
        places,
        force_hooks=True,
        skip_keys=model._skip_keys_device_placement,
    )
