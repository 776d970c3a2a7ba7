"""The sequence on its way through the layers: fewer tokens behind a drop, and who attends whom."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    hidden: torch.Tensor
    rotary: Rotary
    places: torch.Tensor

    def keep(self, index: torch.Tensor) -> TokenStream:
        """The stream with some of its tokens: (batch, fewer) int64, ascending."""
        batch = len(self.places)
        rotary = tuple(pick(each.expand(batch, -1, -1), index) for each in self.rotary)
        return TokenStream(pick(self.hidden, index), rotary, self.places.gather(1, index))


def pick(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(batch, length, width) at (batch, fewer) positions: (batch, fewer, width)."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def causal_mask(
    queries: torch.Tensor, keys: torch.Tensor, real: torch.Tensor | None, *, is_always: bool
) -> torch.Tensor | None:
    """Who may attend whom: no later key, no padding.

    Args:
        queries: (batch, queries) int64, logical positions.
        keys: (batch, keys) int64, likewise; the queries' own come last.
        real: (batch, logical length) bool, False on padding; None: no padding.
        is_always: Whether the attention call cannot do without (it would not be causal).

    Returns:
        (batch, 1, queries, keys) bool; None where stock attention is right without. Padding
        attends itself, so that it stays finite.
    """
    is_plain = queries.shape[1] in (1, keys.shape[1])
    if real is None and is_plain and not is_always:
        return None
    allowed = keys[:, None, :] <= queries[:, :, None]
    if real is not None:
        allowed = allowed & real.gather(1, keys)[:, None, :]
    return (allowed | (keys[:, None, :] == queries[:, :, None]))[:, None]


def for_attention(mask: torch.Tensor | None, like: torch.Tensor, kind: str) -> torch.Tensor | None:
    """A boolean mask as an attention implementation wants it: eager attention adds it."""
    if mask is None or kind != "eager":
        return mask
    lowest = torch.finfo(like.dtype).min
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, lowest)
