"""FastV's choice: the visual tokens that the last prompt token attends to most.

"An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764): behind layer K = 2, the tokens are
ranked by the attention that they receive in that layer from the last token, as a mean over heads.
One row of the attention matrix is all that takes, so the layer itself runs fused; in float32.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from yopo.models.family import Backbone
from yopo.models.layout import TokenLayout


def last_row(
    layer: nn.Module,
    names: Backbone,
    hidden: torch.Tensor,
    keys: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    ends: torch.Tensor,
    real: torch.Tensor | None,
) -> torch.Tensor:
    """The attention of one query per prompt over everything before it, mean over heads.

    Args:
        layer: A stock decoder layer.
        names: Of its modules.
        hidden: (batch, length, hidden), the layer's input.
        keys: (batch, kv_heads, length, head_dim), RoPE applied.
        rotary: (1 or batch, length, head_dim) each.
        ends: (batch,) int64, position of the prompt's last token.
        real: (batch, length) bool, False on padding; None: no padding.

    Returns:
        (batch, length) float32, rows adding up to 1.
    """
    attention, rows = layer.self_attn, torch.arange(len(ends), device=ends.device)
    normed = getattr(layer, names.attention_norm)(hidden[rows, ends][:, None])
    width = attention.config.num_attention_heads * attention.head_dim  # in front, if it is fused
    query = getattr(attention, names.query)(normed)[..., :width]
    query = query.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    if hasattr(attention, "q_norm"):
        query = attention.q_norm(query)
    cos, sin = (each.expand(len(ends), -1, -1)[rows, ends][:, None] for each in rotary)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query = rotate(query, query, cos, sin)[0]  # (batch, heads, 1, head_dim)
    grouped = query.float().unflatten(1, (keys.shape[1], -1)).squeeze(3)
    logits = grouped @ keys.float().transpose(-1, -2) * attention.scaling
    place = torch.arange(keys.shape[2], device=keys.device)
    allowed = place[None] <= ends[:, None]
    if real is not None:
        allowed = allowed & real
    logits = logits.masked_fill(~allowed[:, None, None], float("-inf"))
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def most_attended(row: torch.Tensor, layout: TokenLayout, count: int) -> torch.Tensor:
    """(batch, count) int64: the visual positions with the highest attention, ascending."""
    visual = layout.visual.index
    best = row.gather(1, visual).topk(count, dim=1).indices
    return visual.gather(1, best).sort(dim=1).values
