"""What the attention calls of one layer read in one forward.

Where the cache holds the bottleneck's latent in place of visual keys and values, these are made
again as they are read. With many queries all are, once per forward. With few of them, as in a
decode step, keys are made block by block, and values not at all: attention weights times latents
come first, and only their few sums are expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from yopo.runtime import few_calls
from yopo.runtime.cache import PrunedCacheLayer
from yopo.runtime.quantised import BLOCK_BYTES
from yopo.runtime.token_index import Rotary

if TYPE_CHECKING:
    from yopo.runtime.weights import VisualLayer

Place = Callable[[torch.Tensor, Rotary], torch.Tensor]
"""Makes (batch, KV heads, length, head_dim) keys of projected ones and their cosines and sines."""


class Scored(Protocol):
    """Keys, as a few queries read them."""

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """(batch, heads, queries, visual + text) products with queries (..., head_dim)."""


class Mixed(Protocol):
    """Values, as a few queries read them."""

    def mixture(self, weights: torch.Tensor) -> torch.Tensor:
        """(batch, heads, queries, head_dim) sums under weights of the shape of ``scores``."""


class Reading:
    """A layer's keys and values, for the attention calls of one forward.

    Args:
        cache: Where they are held, this forward's included.
        part: The modules that make them of latents; None where there are none.
        place: Applies norms and positions to keys.
        is_new: Whether this forward has visual tokens.
    """

    def __init__(
        self, cache: PrunedCacheLayer, part: VisualLayer | None, place: Place, *, is_new: bool
    ):
        self.cache, self.split = cache, cache.split
        self._part, self._place, self._is_new = part, place, is_new

    @property
    def num_visual(self) -> int:
        """Cached visual tokens per row."""
        return self.cache.num_visual

    @cached_property
    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of kept KV heads, (batch, kept, visual + text, head_dim)."""
        if not self.cache.has_latent:
            return self.cache.kept
        keys, values = self.cache.kept_text
        latents = self._latents
        own = latents.keys(slice(None)), latents.values(head_dim=values.shape[-1])
        return torch.cat([own[0], keys], dim=2), torch.cat([own[1], values], dim=2)

    @property
    def kept_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Their text alone, (batch, kept, text, head_dim)."""
        return self.cache.kept_text

    @property
    def other(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the other KV heads, (batch, others, text, head_dim)."""
        return self.cache.other

    @property
    def packed(self) -> tuple[Scored, Mixed] | None:
        """Keys and values of kept KV heads if they are best read block by block."""
        if not self.cache.has_latent:
            return self.cache.packed
        if self._is_new:  # visual tokens may attend as well: all are made once
            return None
        keys, values = self.cache.kept_text
        return _Keys(self._latents, keys), _Values(self._latents, values)

    @cached_property
    def _latents(self) -> _Latents:
        latent = self.cache.latent
        rotary = self.cache.index.rotary_on(latent.device)
        assert self._part is not None and rotary is not None, "latents come with both"
        return _Latents(latent, self._part, rotary, self._place)


class _Latents:
    """Latents of visual tokens, and how they become keys and values.

    Args:
        latent: (batch, visual, rank).
        part: The modules that lead out of the bottleneck.
        rotary: Cosines and sines of the tokens.
        place: Applies norms and positions to keys.
    """

    def __init__(self, latent: torch.Tensor, part: VisualLayer, rotary: Rotary, place: Place):
        self.latent, self._part, self._rotary, self._place = latent, part, rotary, place

    def keys(self, span: slice) -> torch.Tensor:
        """(batch, KV heads, span, head_dim)."""
        cosines, sines = self._rotary
        projected = self._part.key(self.latent[:, span])
        return self._place(projected, (cosines[:, span], sines[:, span]))

    def values(self, *, head_dim: int) -> torch.Tensor:
        """(batch, KV heads, visual, head_dim)."""
        return self._part.value(self.latent).unflatten(-1, (-1, head_dim)).transpose(1, 2)

    def value_matrix(self, heads: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(KV heads, head_dim, rank) weights and (KV heads, head_dim) biases of values."""
        weight, bias = self._part.value.matrix()
        own = None if bias is None else bias.unflatten(0, (heads, -1))
        return weight.unflatten(0, (heads, -1)), own

    def spans(self, width: int) -> Iterator[slice]:
        """Spans of tokens whose keys, ``width`` numbers each, stay in the cache of a core."""
        batch, length, _ = self.latent.shape
        size = length
        if not few_calls.preferred_on(self.latent.device):
            size = max(1, BLOCK_BYTES // (4 * batch * width))
        for start in range(0, length, size):
            yield slice(start, min(start + size, length))


class _Keys:
    """Keys that are made block by block, and those of text."""

    def __init__(self, latents: _Latents, text: torch.Tensor):
        self._latents, self._text = latents, text

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """As for entries of a cache."""
        visual, text = self._latents.latent.shape[1], self._text
        found = queries.new_empty(*queries.shape[:3], visual + text.shape[2])
        for span in self._latents.spans(text.shape[1] * text.shape[3]):
            keys = self._latents.keys(span).to(queries.dtype)
            found[..., span] = queries @ keys.transpose(-1, -2)
        found[..., visual:] = queries @ text.to(queries.dtype).transpose(-1, -2)
        return found


class _Values:
    """Values that are never made: their weighted sums are, from sums of latents."""

    def __init__(self, latents: _Latents, text: torch.Tensor):
        self._latents, self._text = latents, text

    def mixture(self, weights: torch.Tensor) -> torch.Tensor:
        """As for entries of a cache."""
        latent = self._latents.latent.to(weights.dtype)
        visual, text = weights.split([latent.shape[1], self._text.shape[2]], dim=-1)
        sums = (visual.flatten(1, 2) @ latent).unflatten(1, weights.shape[1:3])
        weight, bias = self._latents.value_matrix(weights.shape[1])
        mixed = sums @ weight.to(weights.dtype).transpose(-1, -2)
        if bias is not None:
            mixed = mixed + visual.sum(dim=-1, keepdim=True) * bias.to(weights.dtype)[:, None]
        return mixed + text @ self._text.to(weights.dtype)
