"""What chosen queries read in a layer, at least in float32: attention weights and their effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from yopo.models.stock import StockAttention


def softmax(
    module: StockAttention,
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    allowed: torch.Tensor,
) -> torch.Tensor:
    """Attention weights (batch, heads, chosen queries, keys), at least in float32."""
    batch, heads, _, head_dim = queries.shape
    place = positions[:, None, :, None].expand(-1, heads, -1, head_dim)
    precise = torch.promote_types(queries.dtype, torch.float32)
    chosen = queries.gather(2, place).to(precise) * module.scaling
    grouped = chosen.reshape(batch, keys.shape[1], -1, head_dim)
    scores = grouped @ keys.to(precise).transpose(-1, -2)
    scores = scores.reshape(batch, heads, positions.shape[1], -1)
    return scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)


def reading_effect(
    weights: torch.Tensor,
    mass: torch.Tensor,
    values: torch.Tensor,
    kinds: torch.Tensor,
    gram: torch.Tensor,
) -> torch.Tensor:
    """Squared output change when a head's visual keys are hidden from it.

    Args:
        weights: (batch, heads, queries, keys) attention.
        mass: (batch, heads, queries, 2) visual and text mass.
        values: (batch, kv_heads, keys, head_dim).
        kinds: (batch, keys, 2) one-hot of (visual, text).
        gram: (heads, head_dim, head_dim) of the output projection.

    Returns:
        (batch, heads, queries) float32.
    """
    batch, heads, queries, _ = weights.shape
    values, gram = values.to(weights.dtype), gram.to(weights.dtype)

    def mix(chosen: torch.Tensor) -> torch.Tensor:
        grouped = chosen.reshape(batch, values.shape[1], -1, chosen.shape[-1])
        return (grouped @ values).reshape(batch, heads, queries, -1)

    text_only = mix(weights * kinds[:, None, None, :, 1]) / mass[..., 1:].clamp(min=1e-12)
    change = mix(weights) - text_only
    return ((change @ gram) * change).sum(dim=-1)
