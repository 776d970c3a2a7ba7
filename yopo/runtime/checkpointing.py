"""Gradient checkpointing: a layer's activations are recomputed instead of kept.

transformers enables it per layer and implements it in the layer's ``forward``. The pruned decoder
calls a layer's modules instead, so it wraps its own layer step in the function that transformers
set on the layer.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import Cache

from yopo.runtime.layer import LayerRun, VisualInput
from yopo.runtime.token_index import Rotary
from yopo.support.errors import ModelError


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether gradient checkpointing is on for a decoder layer."""
    return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training


def checkpointed(
    run: LayerRun,
    text: torch.Tensor,
    rotary: Rotary,
    visual: VisualInput | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a layer now and again in the backward pass, each time with a fresh cache layer.

    Args:
        run: The layer's run; the other arguments and the result are those of calling it.
    """

    def again(
        text: torch.Tensor, states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if visual is None or states is None:
            return run.afresh()(text, rotary, None)
        if not torch.is_grad_enabled():
            states = states.clone()  # steps without gradients work in place; this input is kept
        return run.afresh()(text, rotary, visual._replace(states=states))

    states = None if visual is None else visual.states
    return run.layer._gradient_checkpointing_func(again, text, states)


def refuse_filled(cache: Cache | None) -> None:
    """Raise ModelError for a non-empty cache, which layers that run twice cannot use."""
    if cache is not None and cache.get_seq_length() > 0:
        raise ModelError(
            "Gradient checkpointing runs layers twice, which a filled KV cache does not allow.",
            remedy="Use no cache in training, or model.eval() for generation.",
        )
