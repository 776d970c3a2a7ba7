"""A digest that tells checkpoints apart (such as fine-tunes) without reading all of them.

Its first half covers the decoder: every layer tensor's name and shape and a few values from its
ends, so that it can also be computed in memory, in milliseconds on a 7B model. The second half,
after a dash, covers values spread over every tensor of the checkpoint's files, whatever their
names: it notices another projector, other embeddings, or another fine-tune's head. Only files have
it; plans of earlier versions have only the first half and are compared by it.

Values are rounded to bfloat16 first, so that a model loaded in another dtype keeps its fingerprint.
Where float16 breaks that (small values vanish, float32 is rounded twice), a model that remembers
its source file is recognized by that file's values in float16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from yopo.models.offloaded import named_weights
from yopo.support.errors import ModelError

SAMPLE = 16
"""Values per piece (the start of a tensor's first row, the end of its last, or a spread piece)."""

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
        samples: Samples of the decoder's tensors, in the file's own precision.
        spread: The second half of the files' fingerprint.
    """

    samples: Samples
    spread: str

    @cached_property
    def fingerprint(self) -> str:
        """The files' fingerprint, both halves."""
        return f"{digest(self.samples)}{_SEPARATOR}{self.spread}"

    @cached_property
    def loaded(self) -> frozenset[str]:
        """First halves of the decoder right after loading, one per precision."""
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
    """(first value, number of values) of each piece of a tensor that the second half covers."""
    if numel <= PIECES * SAMPLE:
        return [(0, numel)]
    last = numel - SAMPLE
    return [(last * number // (PIECES - 1), SAMPLE) for number in range(PIECES)]


def digest(samples: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> str:
    """The first half, from (name inside the decoder, shape, ``sample``) of every tensor.

    The order does not matter; names look like ``layers.0.self_attn.q_proj.weight``.
    """
    state = hashlib.sha256()
    for name, shape, values in sorted(samples, key=lambda entry: entry[0]):
        state.update(f"{name}{tuple(shape)}".encode())
        state.update(_rounded(values))
    return state.hexdigest()


def spread_digest(tensors: Iterable[tuple[tuple[int, ...], torch.Tensor]]) -> str:
    """The second half, from (shape, values at ``pieces``) of every tensor of a checkpoint.

    Names, order and tied tensors stored twice do not matter: they depend on the layout.
    """
    state = hashlib.sha256()
    distinct = {(str(tuple(shape)), _rounded(values)) for shape, values in tensors}
    for shape, values in sorted(distinct):
        state.update(shape.encode() + values)
    return state.hexdigest()[:32]


def _rounded(values: torch.Tensor) -> bytes:
    return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def is_same(first: str, second: str) -> bool:
    """Whether two fingerprints are of the same model, by the halves that both have."""
    return all(
        one == other
        for one, other in zip(first.split(_SEPARATOR), second.split(_SEPARATOR), strict=False)
    )


def fingerprint_of_decoder(decoder: nn.Module) -> str:
    """Fingerprint of a text decoder in memory: the first half, or that of its unchanged files.

    Unmerged LoRA adapters do not count: the base weights are digested.

    Raises:
        ModelError: A weight is packed by a quantizer, so that its values changed.
    """
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList), "decoders have a list of layers"
    samples: Samples = []
    for number, layer in enumerate(layers):
        samples += _samples_of(layer, f"layers.{number}.")
    found = digest(samples)
    source: Source | None = getattr(decoder, _SOURCE, None)
    return source.fingerprint if source is not None and found in source.loaded else found


def _samples_of(layer: nn.Module, prefix: str) -> Samples:
    """Samples of a layer's tensors; raises as ``fingerprint_of_decoder``."""
    samples: Samples = []
    for own, parameter in named_weights(layer):
        name = prefix + own
        if ".lora_" in name:
            continue
        if not is_plain(parameter):
            raise ModelError(
                f"The decoder's {name} is a {type(parameter).__name__}, which has no fingerprint.",
                remedy="Quantize after pruning: yopo.load(..., quantization_config=...).",
            )
        samples.append((name.replace(".base_layer.", "."), parameter.shape, sample(parameter)))
    return samples


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is a plain floating-point tensor, not a quantizer's subclass."""
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()


def remember_source(decoder: nn.Module, source: Source) -> None:
    """Record the files that a decoder was loaded from; valid until its weights change."""
    setattr(decoder, _SOURCE, source)
