"""The attention calls of a pruned layer: text over text and visual keys, visual over neighbors."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from yopo.runtime.attention_masks import AttentionMasks
from yopo.runtime.heads import take
from yopo.runtime.quantised import exact_dtype
from yopo.runtime.reading import Mixed, Reading, Scored

FEW = 8
"""Up to so many text queries, packed keys and values are unpacked block by block as they are read:
more of them are faster by a call over unpacked ones."""


def text_attention(
    queries: torch.Tensor,
    reading: Reading,
    masks: AttentionMasks,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of text queries: kept heads read visual and text keys, all others only text.

    Args:
        queries: (batch, heads, text, head_dim), RoPE applied.
        reading: The layer's keys and values, this forward's included.
        masks: Masks of this forward.
        scale: Factor on the logits.
        dropout: Dropout probability of attention weights.

    Returns:
        (batch, heads, text, head_dim).
    """
    split, outputs = reading.split, []
    attend = partial(_attend, scale=scale, dropout=dropout)
    text_mask, causal = masks.kernel.of(masks.text_mask, queries), masks.text_is_causal
    if split.reading_width:
        few, width = take(queries, split.reading), split.reading_width
        packed = None if dropout or few.shape[2] > FEW else reading.packed
        if packed is not None:
            outputs.append(_read_packed(few, packed, masks.reading_mask, width, scale))
        else:
            keys, values = reading.kept
            mask = masks.kernel.of(masks.reading_mask, queries)
            outputs.append(attend(few, keys, values, mask, width=width))
    if split.dropped_width:
        keys, values = reading.kept_text
        few, width = take(queries, split.dropped), split.dropped_width
        outputs.append(attend(few, keys, values, text_mask, width=width, causal=causal))
    if split.other_width:
        keys, values = reading.other
        few, width = take(queries, split.other), split.other_width
        outputs.append(attend(few, keys, values, text_mask, width=width, causal=causal))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return joined if split.restore is None else take(joined, split.restore)


def _read_packed(
    queries: torch.Tensor,
    kept: tuple[Scored, Mixed],
    mask: torch.Tensor | None,
    width: int,
    scale: float,
) -> torch.Tensor:
    """Attention of a few text queries over packed visual keys and values, and over text.

    Args:
        queries: (batch, KV heads * width, text, head_dim), RoPE applied.
        kept: Entries of these KV heads.
        mask: (batch, 1, text, visual + text) bool, or None.
        width: Query heads per KV head.
        scale: Factor on the logits.

    Returns:
        (batch, KV heads * width, text, head_dim).
    """
    keys, values = kept
    batch, heads, length, head_dim = queries.shape
    exact = queries.to(exact_dtype(queries.dtype)) * scale
    scores = keys.scores(exact.reshape(batch, heads // width, width * length, head_dim))
    if mask is not None:
        by_head = scores.view(batch, heads, length, -1).masked_fill_(~mask, float("-inf"))
        scores = by_head.view(scores.shape)
    mixed = values.mixture(scores.softmax(dim=-1))
    return mixed.view(batch, heads, length, head_dim).to(queries.dtype)


def visual_attention(
    queries: torch.Tensor,
    reading: Reading,
    masks: AttentionMasks,
    radius: int | None,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of visual queries over their neighbors and the text before them.

    Args:
        queries: (batch, attending heads, visual, head_dim), RoPE applied, in ``split.attending``
            order.
        reading: The layer's keys and values, this forward's included.
        masks: Blocks and masks of this forward.
        radius: The neighborhood's Chebyshev radius, or None.
        scale: Factor on the logits.
        dropout: Dropout probability of attention weights.

    Returns:
        (batch, visual, attending heads * head_dim).
    """
    split = reading.split
    padded = queries if split.rectangle is None else take(queries, split.rectangle)
    keys, values = reading.kept
    if split.attending_kv is not None:
        keys, values = (take(each, split.attending_kv) for each in (keys, values))
    blocks = masks.visual_blocks(radius)
    if blocks[0].in_sequence:
        keys, values = (each.index_select(2, masks.sequence) for each in (keys, values))
    batch, heads, length, head_dim = queries.shape
    mixed = queries.new_empty(batch, length, heads, head_dim)
    for block in blocks:
        span = (block.key_start, block.key_stop, reading.num_visual, block.num_text)
        found = _attend(
            padded[:, :, block.start : block.stop],
            _pick(keys, *span),
            _pick(values, *span),
            masks.kernel.of(block.mask, queries),
            width=split.attending_width,
            scale=scale,
            dropout=dropout,
        )
        found = found if split.places is None else take(found, split.places)
        mixed[:, block.start : block.stop] = found.transpose(1, 2)
    return mixed.flatten(2)


def _pick(buffer: torch.Tensor, start: int, stop: int, visual: int, num_text: int) -> torch.Tensor:
    """Visual entries ``[start, stop)`` and the first text ones; a view where they are adjacent."""
    if num_text == 0 or stop == visual:
        return buffer[:, :, start : stop + num_text]
    parts = (buffer[:, :, start:stop], buffer[:, :, visual : visual + num_text])
    return torch.cat(parts, dim=2)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    width: int,
    scale: float,
    dropout: float,
    causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention of ``width`` query heads per KV head."""
    if width == 1 or queries.shape[2] > 1:
        return scaled_dot_product_attention(
            queries, keys, values, mask, dropout, causal, scale=scale, enable_gqa=width > 1
        )
    # One query per head: a group's heads become rows of one call, so no key is repeated.
    batch, _, _, head_dim = queries.shape
    rows = queries.reshape(batch, keys.shape[1], width, head_dim)
    out = scaled_dot_product_attention(rows, keys, values, mask, dropout, scale=scale)
    return out.reshape(batch, -1, 1, head_dim)
