"""The KV cache of a baseline: stock dynamic layers whose lengths differ.

Tokens that a layer never saw have no keys there. All layers report the *logical* length - every
token of the conversation - from which ``generate`` and position ids are computed; which tokens a
layer holds is recorded once per stretch of layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from yopo.support.errors import ModelError


@dataclass
class Stretch:
    """Consecutive layers that hold the same tokens.

    Attributes:
        first: Index of the first layer.
        places: (batch, held) int64, logical positions of the held tokens, ascending.
        num_visual: Number of visual tokens among them, per row.
    """

    first: int
    places: torch.Tensor
    num_visual: int


@dataclass
class Record:
    """State shared by all layers of one cache.

    Attributes:
        length: Tokens seen.
        stretches: Stretches of layers, from the first layer on.
        shift: How much smaller positions of new tokens are than in the dense model.
        visual: (batch, visual) int64, logical positions of visual tokens; None: there are none.
        is_open: Whether a baseline's forward is in progress.
    """

    length: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    shift: int = 0
    visual: torch.Tensor | None = None
    is_open: bool = False

    def stretch(self, layer: int) -> Stretch:
        """The stretch of a layer."""
        return [each for each in self.stretches if each.first <= layer][-1]


class BaselineLayer(DynamicLayer):
    """One layer of the cache, filled by stock attention inside a baseline's forward."""

    is_croppable = False

    def __init__(self, record: Record, number: int, owner: object):
        super().__init__()
        self.record, self.number, self.owner = record, number, owner

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; refuse models other than the baseline that filled the cache."""
        if not self.record.is_open:
            raise ModelError(
                "This cache was filled by a baseline and cannot serve another model.",
                remedy="Start a new conversation (a new cache).",
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """The logical length."""
        return self.record.length if self.is_initialized else 0

    def visual_bytes(self) -> int:
        """Bytes of visual keys and values that this layer holds."""
        assert self.keys is not None and self.values is not None, "the layer is empty"
        held, count = self.keys.shape[-2], self.record.stretch(self.number).num_visual
        return (self.keys.nbytes + self.values.nbytes) * count // held

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refuse beam search."""
        self._refuse()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse to change rows."""
        self._refuse()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to change rows."""
        self._refuse()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to crop."""
        self._refuse()

    def _refuse(self) -> None:
        raise ModelError(
            "A baseline's cache only grows: it supports only greedy decoding and sampling.",
            remedy="Drop num_beams and prompt lookup.",
        )


def adopt(cache: Cache, num_layers: int, owner: object) -> list[BaselineLayer]:
    """Put a baseline's layers into a cache object passed in by transformers.

    Args:
        cache: Empty, or filled by the same baseline.
        num_layers: Number of decoder layers.
        owner: Identifies the baseline.

    Returns:
        The cache's layers, which share a record.

    Raises:
        ModelError: The cache is of another kind, or was filled by another model.
    """
    layers = cache.layers
    own = [each for each in layers if isinstance(each, BaselineLayer) and each.owner is owner]
    if layers and len(own) == len(layers):
        return own
    usable = (DynamicLayer, DynamicSlidingWindowLayer)
    if cache.get_seq_length() > 0 or any(type(layer) not in usable for layer in layers):
        raise ModelError(
            "A baseline fills its own cache and cannot continue another model's.",
            remedy="Start with an empty DynamicCache, or none.",
        )
    record = Record()
    own = [BaselineLayer(record, number, owner) for number in range(num_layers)]
    cache.layers[:] = own
    return own
