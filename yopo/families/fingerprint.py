"""A digest that tells one checkpoint from another (a fine-tune, say) without reading all of it.

It covers every decoder-layer tensor's name and shape and a sample of its values, so it costs
milliseconds on a 7B checkpoint. Values are rounded to bfloat16 first: a checkpoint loaded in
another dtype keeps its fingerprint (float16 copies of float32 weights may round differently).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

SAMPLE = 16
"""Values taken from the start of a tensor's first row and from the end of its last."""


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor (1-D or 2-D) that its fingerprint covers, as bfloat16 on CPU."""
    first = tensor[:1] if tensor.dim() > 1 else tensor
    last = tensor[-1:] if tensor.dim() > 1 else tensor
    values = torch.cat([first.flatten()[:SAMPLE], last.flatten()[-SAMPLE:]])
    return values.detach().to(device="cpu", dtype=torch.bfloat16)


def digest(samples: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> str:
    """Fingerprint from (name inside the decoder, shape, ``sample`` of it) of every tensor.

    The order does not matter; names look like ``layers.0.self_attn.q_proj.weight``.
    """
    state = hashlib.sha256()
    for name, shape, values in sorted(samples, key=lambda entry: entry[0]):
        state.update(f"{name}{tuple(shape)}".encode())
        state.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def fingerprint_of_decoder(decoder: nn.Module) -> str:
    """Fingerprint of a text decoder in memory; the same as its checkpoint's.

    LoRA adapters that are not merged do not count: it is that of the weights below them.
    """
    return digest(
        (name.replace(".base_layer.", "."), tuple(parameter.shape), sample(parameter))
        for name, parameter in decoder.named_parameters()
        if name.startswith("layers.") and ".lora_" not in name
    )
