"""The KV cache of a pruned model: visual keys and values only for kept KV heads.

RoPE is applied before caching, so key order is free: a kept KV head holds its visual keys and then
its text keys (:mod:`yopo.runtime.buffers`); the other KV heads hold only text. Every layer reports
the *logical* length - all tokens seen, visual ones included - because
``generate``, chat continuation and position ids are computed from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from yopo.runtime.buffers import Entries, PackedEntries, Packing, Room
from yopo.runtime.heads import HeadSplit, Index, take
from yopo.runtime.token_index import Rotary, TokenIndex
from yopo.support.errors import ModelError

KeysAndValues = tuple[Entries, Entries]


class PrunedCacheLayer(CacheLayerMixin):
    """One layer of the cache; filled by the pruned decoder only.

    Args:
        split: The layer's head groups.
        index: The cache's token index.
        is_first: Whether this layer keeps the index in step on batch operations.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, split: HeadSplit, index: TokenIndex, *, is_first: bool):
        super().__init__()
        self.split = split
        self.index = index
        self.num_visual = 0
        self._is_first = is_first
        self._kept: KeysAndValues | None = None
        self._other: KeysAndValues | None = None
        self._latent: Entries | None = None

    def empty(self) -> PrunedCacheLayer:
        """An empty layer of the same kind, on the same token index."""
        return PrunedCacheLayer(self.split, self.index, is_first=self._is_first)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add a forward's text: (batch, kv_heads, text, head_dim) keys and values."""
        split = self.split
        if split.num_kept_kv:
            packings = split.packings
            self._kept = _extended(self._kept, keys, values, split.kept_kv, packings)
        if split.other_width:
            self._other = _extended(self._other, keys, values, split.other_kv)
        self.is_initialized = True

    def make_room(self, count: int) -> tuple[Room, Room]:
        """Make room for a forward's visual tokens after those of earlier forwards.

        Call it after ``append``, on a layer that keeps KV heads.

        Returns:
            Keys and values, (batch, kept, count, head_dim) each, for the caller to fill.
        """
        keys, values = _filled(self._kept)
        self.num_visual += count
        return keys.make_room(count), values.make_room(count)

    def make_latent_room(self, states: torch.Tensor) -> Room:
        """Make room for the latents of a forward's visual tokens, as ``make_room`` does for keys.

        Args:
            states: (batch, count, hidden), for the number of tokens, dtype and device.

        Returns:
            (batch, 1, count, rank), for the caller to fill.
        """
        batch, count, _ = states.shape
        if self._latent is None:
            nothing = states.new_empty(batch, 1, 0, self.split.latent_rank)
            self._latent = _entries(nothing, self.split.latent)
        self.num_visual += count
        return self._latent.make_room(count)

    @property
    def latent(self) -> torch.Tensor:
        """(batch, visual, rank) latents of cached visual tokens, unpacked."""
        if self._latent is None:
            raise ValueError("this layer holds no latents")
        return self._latent.all[:, 0]

    @property
    def has_latent(self) -> bool:
        """Whether there are visual tokens whose keys and values have to be rebuilt."""
        return self._latent is not None

    @property
    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of kept KV heads, (batch, kept, visual + text, head_dim), unpacked.

        Only of text where latents are held in place of visual ones.
        """
        keys, values = _filled(self._kept)
        return keys.all, values.all

    @property
    def kept_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Their text alone, (batch, kept, text, head_dim)."""
        keys, values = _filled(self._kept)
        return keys.text, values.text

    @property
    def packed(self) -> KeysAndValues | None:
        """Keys and values of kept KV heads if some are packed: to be read block by block."""
        kept = self._kept
        return kept if kept is not None and any(each.reads_in_blocks for each in kept) else None

    @property
    def other(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the other KV heads, (batch, others, text, head_dim)."""
        keys, values = _filled(self._other)
        return keys.all, values.all

    def visual_bytes(self) -> int:
        """Bytes of visual keys and values, or latents, that this layer holds, steps included."""
        latent = () if self._latent is None else (self._latent,)
        return sum(each.visual_bytes() for each in (*(self._kept or ()), *latent))

    def get_seq_length(self) -> int:
        """The logical length."""
        return self.index.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical key length and offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Never called by the pruned decoder."""
        self.update(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> NoReturn:
        """Refuse stock attention, which would need the visual keys that are missing here."""
        raise ModelError(
            "This cache was filled by a pruned model and cannot serve the dense one.",
            remedy="Start a new conversation (a new cache) for the dense model.",
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow a beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep batch rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.is_initialized:
            rows = self._entries()[0].text.shape[0]
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (text only).

        Raises:
            ModelError: A positive number (formerly the length to keep), or tokens of an image.
        """
        if tokens_to_remove > 0:
            raise ModelError(
                f"crop({tokens_to_remove}): a cache is cropped by a negative number of tokens.",
                remedy=f"Remove {tokens_to_remove} tokens by crop(-{tokens_to_remove}).",
            )
        count = -int(tokens_to_remove)  # prompt lookup may count in tensors
        if not count or not self.is_initialized:
            return
        if self._is_first:
            self.index.crop(count)
        for entries in self._entries():
            entries.shorten(count)

    def reset(self) -> None:
        """Forget everything."""
        self._kept = self._other = self._latent = None
        self.num_visual = 0
        self.is_initialized = False
        if self._is_first:
            self.index.clear()

    def tensors(self) -> list[torch.Tensor]:
        """What holds this layer's keys, values and latents."""
        latent = () if self._latent is None else (self._latent,)
        return [each for entries in (*self._entries(), *latent) for each in entries.tensors()]

    def hold(self, other: PrunedCacheLayer, tensors: Iterator[torch.Tensor], surplus: int) -> None:
        """Hold what another layer holds, all but its last tokens, in tensors of one's own.

        Args:
            other: Filled by one forward.
            tensors: Yields one for each that the other layer lists.
            surplus: How many tokens of text are left out.
        """
        self._kept, self._other = _on(other._kept, tensors), _on(other._other, tensors)
        self._latent = None if other._latent is None else other._latent.on(tensors)
        self.num_visual, self.is_initialized = other.num_visual, True
        for entries in self._entries():
            entries.shorten(surplus)

    def _entries(self) -> list[Entries]:
        return [*(self._kept or ()), *(self._other or ())]

    def _select(self, rows: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        if self._is_first:
            self.index.select(rows)
        latent = [] if self._latent is None else [self._latent]
        for entries in self._entries() + latent:
            entries.select(rows)


def _extended(
    held: KeysAndValues | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: Index,
    packings: tuple[Packing | None, Packing | None] = (None, None),
) -> KeysAndValues:
    """Append some heads' keys and values to their entries, created if there are none yet."""
    added = [take(each, heads) for each in (keys, values)]
    if held is None:
        key, value = map(_entries, added, packings)
        return key, value
    for entries, text in zip(held, added, strict=True):
        entries.append(text)
    return held


def _on(held: KeysAndValues | None, tensors: Iterator[torch.Tensor]) -> KeysAndValues | None:
    if held is None:
        return None
    keys, values = held
    return keys.on(tensors), values.on(tensors)


def _entries(text: torch.Tensor, packing: Packing | None) -> Entries:
    return Entries(text) if packing is None else PackedEntries(text, packing)


def _filled(held: KeysAndValues | None) -> KeysAndValues:
    if held is None:
        raise ValueError("these heads hold no keys and values yet")
    return held


def new_layers(splits: list[HeadSplit]) -> list[PrunedCacheLayer]:
    """Empty cache layers that share one token index."""
    index = TokenIndex()
    return [
        PrunedCacheLayer(split, index, is_first=number == 0) for number, split in enumerate(splits)
    ]


def place_latents(layers: Sequence[PrunedCacheLayer], rotary: Rotary) -> None:
    """Keep cosines and sines of a forward's visual tokens if some layer rebuilds their keys."""
    if any(layer.split.latent_rank for layer in layers):
        layers[0].index.place(rotary)


def adopt(cache: Cache, splits: list[HeadSplit]) -> list[PrunedCacheLayer]:
    """Put pruned layers into a cache object passed in by transformers.

    The object is kept (generate and prompt lookup hold references to it); its empty layers are
    replaced.

    Raises:
        ModelError: The cache is static, quantised or offloaded, or was filled by another model.
    """
    layers = cache.layers
    own = [layer for layer in layers if isinstance(layer, PrunedCacheLayer)]
    if own and len(own) == len(layers):
        if any(one.split.differs(other) for one, other in zip(own, splits, strict=True)):
            raise ModelError("This cache was filled under another plan; start a new one.")
        return own
    usable = (DynamicLayer, DynamicSlidingWindowLayer)  # the latter: only inside its window
    if getattr(cache, "offloading", False) or any(type(each) not in usable for each in layers):
        kind = type(layers[0]).__name__ if layers else type(cache).__name__
        raise ModelError(
            f"A pruned model keeps its own cache and cannot use {kind}.",
            remedy="Drop cache_implementation (and past_key_values), or pass a DynamicCache.",
        )
    if cache.get_seq_length() > 0:
        raise ModelError(
            "This cache was filled by the dense model and cannot be continued by the pruned one.",
            remedy="Prefill the conversation with the pruned model.",
        )
    own = new_layers(splits)
    cache.layers[:] = own
    return own
