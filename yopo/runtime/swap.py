"""Change the class of a module in place, where its forward is then really reached.

A forward that somebody set on the object itself shadows its class's: accelerate does so to run its
hooks around the forward that it found. There the new forward goes inside the hooks.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from yopo.support.errors import ModelError

_SLOTS = ("forward", "_old_forward")
"""Where an object may hold a forward of its own; accelerate keeps in the second what its first
calls."""


def swap_class(module: nn.Module, other: type[nn.Module]) -> None:
    """Make ``module`` an instance of ``other``, hooks of accelerate staying around its forward.

    Swapping back leaves the object as it was; hooks that came or went meanwhile are kept.

    Raises:
        ModelError: Something else stands in the forward's place (a compiled or wrapped one), which
            would never reach the new one.
    """
    stock = type(module)
    bound = [name for name in _SLOTS if _is_bound(vars(module).get(name), module, stock)]
    for name in _SLOTS:
        found = vars(module).get(name)
        if found is not None and name not in bound and not _calls_old_forward(found):
            raise ModelError(
                f"The forward of the {stock.__name__} was replaced on the object (by a "
                f"{type(found).__name__}), which would never reach the pruned one.",
                remedy="Prune first, then compile or wrap.",
            )
    module.__class__ = other
    for name in bound:
        vars(module)[name] = MethodType(other.forward, module)


def restore_class(module: nn.Module, stock: type[nn.Module]) -> None:
    """Undo :func:`swap_class`. Wrappers that came meanwhile stay as they are."""
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
    """Whether a forward is the one by which accelerate runs its hooks around the old one."""
    return isinstance(found, partial) and found.func.__module__ == "accelerate.hooks"
