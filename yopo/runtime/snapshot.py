"""Modules and weights at one time: whether calling them still does the same in the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from yopo.models.stock import ModuleListOf, StockLayer

_KNOWN = ("torch.", "transformers.", "yopo.")
"""Beginnings of the names of modules whose classes compute the same in every call."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REPLACED = ("forward", "_hf_hook")
"""Attributes of a module whose calls run something else than its class's forward."""


class Snapshot:
    """What the layers of a decoder, and the visual parts of some, consist of now.

    It is compared in every prefill, while a GPU waits, so all that is looked at lies in lists.

    Args:
        layers: The stock layers. The forwards of the layers themselves and of their attention are
            never called, so hooks on these do not matter.
        parts: The modules of visual tokens.
        device: Where all weights have to be.

    Attributes:
        is_plain: Whether calls do the same each time: no hooks, replaced forwards, adapters or
            training, and all weights are plain ones on the device.
    """

    def __init__(
        self, layers: ModuleListOf[StockLayer], parts: nn.ModuleList, device: torch.device
    ):
        uncalled = {*layers, *(layer.self_attn for layer in layers)}
        modules = [module for root in (*layers, *parts) for module in root.modules()]
        called = [module for module in modules if module not in uncalled]
        self._attributes = [module.__dict__ for module in modules]
        self._of_called = [module.__dict__ for module in called]
        self._hooks = [each[name] for each in self._of_called for name in _HOOKS]
        self._children = [each["_modules"] for each in self._attributes if each["_modules"]]
        self._child_ids = [*_child_ids(self._children)]
        held = (each[kind] for each in self._attributes for kind in ("_parameters", "_buffers"))
        self._places = [(some, name) for some in held for name in some]
        weights = self._weights()
        self._weight_ids = [*map(id, weights)]
        self._was_bare = self._is_bare()
        self.is_plain = (
            self._was_bare
            and all(_is_known(type(module)) for module in modules)  # type: ignore[arg-type]  # classes are hashable
            and all(_is_plain_on(device, weight) for weight in weights if weight is not None)
        )
        self._locations = self._locate(weights)

    def is_current(self) -> bool:
        """Whether nothing was changed since but values of weights. While it is not plain, what
        leaves it so, such as one more hook, may go unnoticed."""
        if self._is_bare() != self._was_bare:
            return False
        if [*_child_ids(self._children)] != self._child_ids:
            return False
        weights = self._weights()
        if [*map(id, weights)] != self._weight_ids:
            return False
        return self._locate(weights) == self._locations

    def _locate(self, weights: Iterable[torch.Tensor | None]) -> list[int] | list[torch.device]:
        """Where weights are: in which memory, which those that are not plain may not say."""
        if self.is_plain:
            return [weight.data_ptr() for weight in weights if weight is not None]
        return [weight.device for weight in weights if weight is not None]

    def _weights(self) -> list[torch.Tensor | None]:
        return [some.get(name) for some, name in self._places]

    def _is_bare(self) -> bool:
        if any(map(itemgetter("training"), self._attributes)) or any(self._hooks):
            return False
        if nn.modules.module._has_any_global_hook():
            return False
        return not any(name in each for each in self._of_called for name in _REPLACED)


def _child_ids(children: Iterable[dict[str, nn.Module]]) -> Iterator[int]:
    return (id(child) for each in children for child in each.values())


def _is_plain_on(device: torch.device, weight: torch.Tensor) -> bool:
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.device == device


@cache
def _is_known(kind: type[nn.Module]) -> bool:
    return f"{kind.__module__}.".startswith(_KNOWN)
