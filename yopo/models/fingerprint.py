"""A digest that tells one checkpoint from another (a fine-tune, say) without reading all of it.

Its first half covers the decoder: every layer tensor's name and shape and a few values from its
ends, so that it can be taken in memory as well, in milliseconds on a 7B model. The second half,
behind a dash, covers values spread over every tensor of the checkpoint's files, whatever the
tensors are called there: another projector, other embeddings, a head of another fine-tune. Only
files have it; plans of earlier versions have the first half alone, and are compared by it.

Values are rounded to bfloat16 first: a model loaded in another dtype keeps its fingerprint. Where
float16 does not (small values vanish in it, float32 is rounded twice), a model that remembers which
file it came from is recognised by what that file's values become in float16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from yopo.support.errors import ModelError

SAMPLE = 16
"""Values in a piece: the start of a tensor's first row, the end of its last, a piece spread out."""

PIECES = 8
"""Pieces spread evenly over a tensor, for the second half."""

LOADED = (torch.float32, torch.bfloat16, torch.float16)
"""Precisions that a checkpoint is loaded in."""

_SEPARATOR = "-"
_SOURCE = "_yopo_source"

Samples = list[tuple[str, tuple[int, ...], torch.Tensor]]
"""(name inside the decoder, shape, values that the first half covers) of every layer tensor."""


@dataclass(frozen=True, eq=False)
class Source:
    """The checkpoint that a decoder in memory was loaded from.

    Attributes:
        samples: The decoder's, in the file's own precision.
        spread: The second half of the files' fingerprint.
    """

    samples: Samples
    spread: str

    @cached_property
    def fingerprint(self) -> str:
        """The files', both halves."""
        return f"{digest(self.samples)}{_SEPARATOR}{self.spread}"

    @cached_property
    def loaded(self) -> frozenset[str]:
        """First halves that the decoder has right after loading, one per precision."""
        return frozenset(
            digest((name, shape, values.to(dtype)) for name, shape, values in self.samples)
            for dtype in LOADED
        )


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor (1-D or 2-D) that the first half covers, on CPU."""
    first = tensor[:1] if tensor.dim() > 1 else tensor
    last = tensor[-1:] if tensor.dim() > 1 else tensor
    return torch.cat([first.flatten()[:SAMPLE], last.flatten()[-SAMPLE:]]).detach().cpu()


def pieces(numel: int) -> list[tuple[int, int]]:
    """(first value, number of values) of what the second half covers of a tensor."""
    if numel <= PIECES * SAMPLE:
        return [(0, numel)]
    last = numel - SAMPLE
    return [(last * number // (PIECES - 1), SAMPLE) for number in range(PIECES)]


def digest(samples: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> str:
    """First half, from (name inside the decoder, shape, ``sample`` of it) of every tensor.

    The order does not matter; names look like ``layers.0.self_attn.q_proj.weight``.
    """
    state = hashlib.sha256()
    for name, shape, values in sorted(samples, key=lambda entry: entry[0]):
        state.update(f"{name}{tuple(shape)}".encode())
        state.update(_rounded(values))
    return state.hexdigest()


def spread_digest(tensors: Iterable[tuple[tuple[int, ...], torch.Tensor]]) -> str:
    """Second half, from (shape, values at ``pieces``) of every tensor of a checkpoint.

    Neither names nor order matter, nor a tied tensor that is stored twice: they are a layout's.
    """
    state = hashlib.sha256()
    distinct = {(str(tuple(shape)), _rounded(values)) for shape, values in tensors}
    for shape, values in sorted(distinct):
        state.update(shape.encode() + values)
    return state.hexdigest()[:32]


def _rounded(values: torch.Tensor) -> bytes:
    return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def is_same(first: str, second: str) -> bool:
    """Whether two fingerprints are of one model, by what both of them cover."""
    return all(
        one == other
        for one, other in zip(first.split(_SEPARATOR), second.split(_SEPARATOR), strict=False)
    )


def fingerprint_of_decoder(decoder: nn.Module) -> str:
    """Fingerprint of a text decoder in memory: its first half, or all of the files' that it is of.

    LoRA adapters that are not merged do not count: it is that of the weights below them.

    Raises:
        ModelError: A weight is packed by a quantizer, which changed its values.
    """
    samples: Samples = []
    for name, parameter in decoder.named_parameters():
        if not name.startswith("layers.") or ".lora_" in name:
            continue
        if not is_plain(parameter):
            raise ModelError(
                f"The decoder's {name} is a {type(parameter).__name__}, which has no fingerprint.",
                remedy="Quantize behind the pruning: yopo.load(..., quantization_config=...).",
            )
        samples.append((name.replace(".base_layer.", "."), parameter.shape, sample(parameter)))
    found = digest(samples)
    source: Source | None = getattr(decoder, _SOURCE, None)
    return source.fingerprint if source is not None and found in source.loaded else found


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is floating-point numbers in memory, not a quantizer's tensor subclass."""
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()


def remember_source(decoder: nn.Module, source: Source) -> None:
    """Let a decoder know the files that it was loaded from, until its weights change."""
    setattr(decoder, _SOURCE, source)
