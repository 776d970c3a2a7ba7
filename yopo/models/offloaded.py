"""Decoder layers whose weights accelerate keeps on disk or in host memory between calls."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn


def is_offloaded(decoder: nn.Module) -> bool:
    """Whether the weights of a decoder are elsewhere between calls, as far as it holds any."""
    return any(weight.is_meta for weight in decoder.parameters())


def at_hand(layer: nn.Module) -> AbstractContextManager[None]:
    """A block in which a layer's weights are used: accelerate fetches them module by module."""
    return nullcontext()
