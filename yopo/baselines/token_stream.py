"""The token sequence between layers: which tokens remain after a drop, and their causal masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (1 or batch, length, head_dim) each."""


@dataclass(frozen=True)
class TokenStream:
    """The tokens between two layers.

    Attributes:
        hidden: (batch, length, hidden).
        rotary: Their cosines and sines.
        places: (batch, length) int64, their logical positions, ascending.
        visual: (batch, visual) int64, which of the ``length`` tokens are visual, ascending.
        added: (batch, length, hidden) each, features added to them after the first layers.
    """

    hidden: torch.Tensor
    rotary: Rotary
    places: torch.Tensor
    visual: torch.Tensor
    added: tuple[torch.Tensor, ...] = ()

    def after(self, layer: int, hidden: torch.Tensor) -> TokenStream:
        """The stream with a layer's output, (batch, length, hidden)."""
        if layer < len(self.added):
            hidden = hidden + self.added[layer]
        return replace(self, hidden=hidden)

    def with_visual(self, kept: torch.Tensor) -> TokenStream:
        """The stream with all of its text and some of its visual tokens.

        Args:
            kept: (batch, fewer visual) int64, indices into ``visual``, ascending.
        """
        batch, length = self.places.shape
        chosen = self.visual.gather(1, kept)
        is_text = torch.ones(batch, length, dtype=torch.bool, device=chosen.device)
        is_text.scatter_(1, self.visual, False)
        text = is_text.nonzero()[:, 1].reshape(batch, -1)
        index = torch.cat([text, chosen], dim=1).sort(dim=1).values
        cos, sin = (pick(each.expand(batch, -1, -1), index) for each in self.rotary)
        return TokenStream(
            pick(self.hidden, index),
            (cos, sin),
            self.places.gather(1, index),
            torch.searchsorted(index, chosen),
            tuple(pick(each, index) for each in self.added),
        )


def pick(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(batch, length, width) at (batch, fewer) positions: (batch, fewer, width)."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def spread(values: torch.Tensor, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(batch, visual, hidden) values at their positions in zeros shaped ``like``."""
    places = index[..., None].expand(-1, -1, like.shape[-1])
    return torch.zeros_like(like).scatter_(1, places, values.to(like))


def causal_mask(
    queries: torch.Tensor, keys: torch.Tensor, real: torch.Tensor | None, *, is_always: bool
) -> torch.Tensor | None:
    """The causal mask: no later key, no padding.

    Args:
        queries: (batch, queries) int64, logical positions.
        keys: (batch, keys) int64, logical positions; the queries' own come last.
        real: (batch, logical length) bool, False on padding; None: no padding.
        is_always: Whether the attention call always needs a mask (it would not be causal).

    Returns:
        (batch, 1, queries, keys) bool; None where stock attention needs no mask. Padding attends
        to itself to stay finite.
    """
    is_plain = queries.shape[1] in (1, keys.shape[1])
    if real is None and is_plain and not is_always:
        return None
    allowed = keys[:, None, :] <= queries[:, :, None]
    if real is not None:
        allowed = allowed & real.gather(1, keys)[:, None, :]
    return (allowed | (keys[:, None, :] == queries[:, :, None]))[:, None]


def for_attention(mask: torch.Tensor | None, like: torch.Tensor, kind: str) -> torch.Tensor | None:
    """Convert a boolean mask for an attention implementation; eager attention adds its mask."""
    if mask is None or kind != "eager":
        return mask
    lowest = torch.finfo(like.dtype).min
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, lowest)
