"""Watching the attention of text over images in a pruned model, as reports need it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from yopo.runtime.attention_masks import AttentionMasks
from yopo.runtime.reading import Reading

Watch = Callable[[int, torch.Tensor, Reading, AttentionMasks, float], None]
"""Called by every layer before its text attends: (layer, queries (batch, heads, text, head_dim),
the keys that they read, the forward's masks, the factor on logits)."""

_WATCH: ContextVar[Watch | None] = ContextVar("yopo_watch", default=None)


def watch() -> Watch | None:
    """What watches the layers in this thread, or None."""
    return _WATCH.get()


@contextmanager
def watching(call: Watch) -> Iterator[None]:
    """Have the layers of pruned models in this thread watched inside a ``with`` block."""
    token = _WATCH.set(call)
    try:
        yield
    finally:
        _WATCH.reset(token)
