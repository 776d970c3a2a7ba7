"""What callers hand to a decoder beside a prompt: packed rows, and embeddings of their own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from transformers.masking_utils import find_packed_sequence_indices

from yopo.models.layout import TokenLayout
from yopo.runtime.offload import weight_of
from yopo.support.errors import ModelError

_PAGED = ("block_table", "read_index", "write_index")
"""Arguments of transformers' continuous batching."""

_PACKED = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q")
"""Names that padding-free collators have for where the samples of a packed row begin."""

_HASHED = 64
"""Components of an embedding that tell it from all others."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> integers of as many."""


def no_paged_attention() -> ModelError:
    """The refusal of continuous batching, where it begins and where it would run."""
    return ModelError(
        "A pruned model has no paged attention, which continuous batching (generate_batch) needs.",
        remedy="Use generate, with padded batches, or ask the dense model.",
    )


def packed_segments(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    shape: tuple[int, int],
    kwargs: Mapping[str, object],
    *,
    cached: int | None,
) -> torch.Tensor | None:
    """The sample of every token, where rows hold several samples behind one another.

    As in the stock model, positions that restart say so where there is neither a mask nor a cache.
    A padding-free collator's ``cu_seq_lens_q`` says so as well.

    Args:
        position_ids: (1 or batch, sequence); or (4, batch, sequence), text positions first; or
            (3, batch, sequence), which say nothing of samples; or None.
        attention_mask: The caller's, or None.
        shape: (batch, sequence).
        kwargs: What else the decoder was given.
        cached: How many tokens are cached; None if keys and values are not kept.

    Returns:
        (batch, sequence) int64, or None if every row is one sample.

    Raises:
        ModelError: Paged attention is asked for, or samples begin where no token is, or behind
            cached ones.
    """
    if any(kwargs.get(name) is not None for name in _PAGED):
        raise no_paged_attention()
    starts = next((kwargs[name] for name in _PACKED if kwargs.get(name) is not None), None)
    if starts is not None:
        segments = _between(starts, shape)
        if segments is not None and cached:
            raise ModelError(
                f"A packed row of several samples cannot continue a cache of {cached} tokens.",
                remedy="Pack without a cache, or continue one sample per row.",
            )
        return segments
    if position_ids is None or attention_mask is not None or cached is not None:
        return None
    if position_ids.dim() == 3:
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    return find_packed_sequence_indices(position_ids.expand(*shape))


def _between(starts: object, shape: tuple[int, int]) -> torch.Tensor | None:
    batch, length = shape
    if not isinstance(starts, torch.Tensor) or batch != 1 or int(starts[-1]) != length:
        raise ModelError(
            f"Cumulative sequence lengths do not end at the {length} tokens of one row.",
            remedy="Pack all samples of a batch into one row, as DataCollatorWithFlattening does.",
        )
    if len(starts) <= 2:
        return None
    place = torch.arange(length, device=starts.device)
    return torch.bucketize(place, starts[1:].long(), right=True)[None]


def warn_of_features(embeds: torch.Tensor, table: nn.Module, layout: TokenLayout | None) -> None:
    """Warn if embeddings that a caller gave hold something that is no token.

    Image features merged in beforehand look like any embedding: nothing says where an image begins
    or what its grid is, and all of it is computed in full.

    Args:
        embeds: (batch, sequence, hidden).
        table: The embedding module.
        layout: Visual tokens that are known, or None.
    """
    if embeds.shape[1] == 1 or type(table) is not nn.Embedding:
        return  # a single step; or embeddings that are more than rows of a table
    weight = weight_of(table)
    if type(weight.data) is not torch.Tensor or weight.dtype.itemsize not in _INTEGERS:
        return
    known = torch.isin(_hashes(embeds.detach().to(weight)), _hashes(weight.detach()))
    if layout is not None:
        known = known | layout.visual.marks(embeds.shape[1])
    unknown = int((~known).sum())
    if unknown:
        warnings.warn(
            f"inputs_embeds hold {unknown} embeddings of no token. If they are image features, "
            "nothing is pruned for them: the plan needs to know where images are. Give input_ids "
            "with pixel_values, or with mm_encoder_outputs={'image': "
            "model.get_image_features(...)} if images are encoded already.",
            stacklevel=2,
        )


def _hashes(rows: torch.Tensor) -> torch.Tensor:
    """A number per row of (..., width) floating-point rows, the same for the same bits."""
    rows = rows[..., :_HASHED].contiguous()
    bits = rows.view(_INTEGERS[rows.element_size()]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (rows.shape[-1],), generator=generator) | 1
    return (bits * factors.to(bits.device)).sum(dim=-1)
