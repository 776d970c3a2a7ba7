"""Decoder layers whose weights accelerate keeps on disk or in host memory between calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from yopo.models.stock import StockDecoder


def is_offloaded(decoder: StockDecoder) -> bool:
    """Whether weights of a decoder's layers are elsewhere between calls."""
    return any(weight.is_meta for weight in decoder.layers.parameters())


@contextmanager
def at_hand(layer: nn.Module) -> Iterator[None]:
    """Hold a layer's weights on the device that they run on, inside the block.

    accelerate fetches the weights of every module when it is called, and drops them after the
    call; here they are fetched once, and dropped at the end of the block.
    """
    with ExitStack() as stack:
        for module in layer.modules():
            for hook in _hooks(module):
                stack.callback(_drop, module, hook)
                hook.pre_forward(module)
                hook.offload = False
        yield


def _drop(module: nn.Module, hook: Any) -> None:
    hook.offload = True
    hook.post_forward(module, None)


def _hooks(module: nn.Module) -> list[Any]:
    """A module's hooks of accelerate that fetch weights."""
    found = getattr(module, "_hf_hook", None)
    every = getattr(found, "hooks", (found,))
    return [each for each in every if getattr(each, "offload", False)]
