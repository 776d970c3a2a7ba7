"""Change the class of a module in place, if the new forward will actually be called.

A forward set on the object itself shadows that of its class: accelerate does this to run its hooks
around the original forward. In that case the new forward is put inside the hooks.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from yopo.support.errors import ModelError

_SLOTS = ("forward", "_old_forward")
"""Attributes in which an object may hold a forward; accelerate stores the original in the second.
"""


def swap_class(module: nn.Module, other: type[nn.Module]) -> None:
    """Make ``module`` an instance of ``other``, keeping accelerate's hooks around its forward.

    Swapping back restores the object, except for hooks added or removed in between.

    Raises:
        ModelError: The forward was replaced by something else (a compiled or wrapped one), which
            would never call the new one.
    """
    stock = type(module)
    bound = [name for name in _SLOTS if _is_bound(vars(module).get(name), module, stock)]
    for name in _SLOTS:
        found = vars(module).get(name)
        if found is not None and name not in bound and not _calls_old_forward(found):
            raise ModelError(
                f"The forward of the {stock.__name__} was replaced on the object (by a "
                f"{type(found).__name__}), which would never call the pruned one.",
                remedy="Prune first, then compile or wrap.",
            )
    module.__class__ = other
    for name in bound:
        vars(module)[name] = MethodType(other.forward, module)


def restore_class(module: nn.Module, stock: type[nn.Module]) -> None:
    """Undo :func:`swap_class`. Wrappers added in between are kept."""
    swapped = type(module)
    bound = [name for name in _SLOTS if _is_bound(vars(module).get(name), module, swapped)]
    module.__class__ = stock
    for name in bound:
        vars(module)[name] = MethodType(stock.forward, module)


def _is_bound(found: Any, module: nn.Module, owner: type[nn.Module]) -> bool:
    return (
        isinstance(found, MethodType)
        and found.__self__ is module
        and found.__func__ is owner.forward
    )


def _calls_old_forward(found: Any) -> bool:
    """Whether a forward is accelerate's, which runs its hooks around the original one."""
    return isinstance(found, partial) and found.func.__module__ == "accelerate.hooks"
