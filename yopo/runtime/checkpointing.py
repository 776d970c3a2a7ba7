"""Gradient checkpointing: a layer's activations are computed again instead of kept.

transformers switches it on layer by layer and lets a layer's ``forward`` do the work. The pruned
decoder calls a layer's parts instead, so it wraps its own step of a layer in the function that
transformers put there.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import Cache

from yopo.runtime.layer import LayerRun, Rotary, VisualInput
from yopo.support.errors import ModelError


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a decoder layer's activations are not to be kept."""
    return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training


def checkpointed(
    run: LayerRun,
    text: torch.Tensor,
    rotary: Rotary,
    visual: VisualInput | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a layer now and again in the backward pass, each time with a cache layer of its own.

    Args:
        run: The layer's run, whose other arguments and result follow.
    """

    def again(
        text: torch.Tensor, states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if visual is None or states is None:
            return run.afresh()(text, rotary, None)
        if not torch.is_grad_enabled():
            states = states.clone()  # steps without gradients work in place; this is kept
        return run.afresh()(text, rotary, visual._replace(states=states))

    states = None if visual is None else visual.states
    return run.layer._gradient_checkpointing_func(again, text, states)


def refuse_filled(cache: Cache | None) -> None:
    """Raise ModelError for a cache that holds something: layers that run twice cannot use it."""
    if cache is not None and cache.get_seq_length() > 0:
        raise ModelError(
            "Gradient checkpointing runs layers twice, which a filled KV cache does not allow.",
            remedy="Use no cache in training, or model.eval() for generation.",
        )
