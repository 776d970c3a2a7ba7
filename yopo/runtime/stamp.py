"""Where the weights of layers lie, and that nothing but their modules' own forwards runs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from yopo.models.stock import ModuleListOf, StockLayer

Stamp = tuple[object, ...]
"""Equal as long as the same classes of modules use the same memory."""

_KNOWN = ("torch.", "transformers.", "yopo.")
"""Beginnings of the names of modules whose classes compute the same in every call."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def stamp_of(
    layers: ModuleListOf[StockLayer], parts: nn.ModuleList, device: torch.device
) -> Stamp | None:
    """A stamp of decoder layers and the visual parts of some.

    Args:
        layers: The stock layers. The forwards of the layers themselves and of their attention are
            never called, so hooks on these do not matter.
        parts: The modules of visual tokens.
        device: Where all weights have to be.

    Returns:
        None if a weight is elsewhere or packed, or if calls of a module may do something else than
        before: hooks, replaced forwards, adapters, training.
    """
    if nn.modules.module._has_any_global_hook():
        return None
    uncalled = {*layers, *(layer.self_attn for layer in layers)}
    found: list[object] = []
    rest: list[nn.Module] = [*layers, *parts]
    while rest:
        module = rest.pop()
        own = vars(module)
        if own["training"] or not (module in uncalled or _is_bare(own)):
            return None
        kind = type(module)
        if not _is_known(kind):  # type: ignore[arg-type]  # classes are hashable
            return None
        found.append(kind)
        for weight in (*own["_parameters"].values(), *own["_buffers"].values()):
            if weight is None:
                continue
            if type(weight) not in (nn.Parameter, torch.Tensor) or weight.device != device:
                return None
            found.append(weight.data_ptr())
        rest += (child for child in own["_modules"].values() if child is not None)
    return tuple(found)


def _is_bare(own: dict[str, object]) -> bool:
    hooks = any(own[name] for name in _HOOKS)
    return not hooks and "forward" not in own and "_hf_hook" not in own


@cache
def _is_known(kind: type[nn.Module]) -> bool:
    return f"{kind.__module__}.".startswith(_KNOWN)
