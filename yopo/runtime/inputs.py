"""Special inputs of a decoder: packed rows, and embeddings supplied by the caller."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import nn
from transformers.masking_utils import find_packed_sequence_indices

from yopo.models.layout import LayoutProbe
from yopo.models.streams import TokenLayout
from yopo.runtime.offload import weight_of
from yopo.support.errors import ModelError, YopoWarning

_WARNED: WeakSet[nn.Module] = WeakSet()
"""Decoders about which was warned that their images are missing."""

_PAGED = ("block_table", "read_index", "write_index")
"""Arguments of transformers' continuous batching."""

_PACKED = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q")
"""Names under which padding-free collators pass the sample boundaries of a packed row."""

_HASHED = 64
"""Components of an embedding that identify it."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Item size in bytes -> integer dtype of that size."""


def no_paged_attention() -> ModelError:
    """The error for continuous batching, raised where it starts and where it would run."""
    return ModelError(
        "A pruned model has no paged attention, which continuous batching (generate_batch) needs.",
        remedy="Use generate with padded batches, or use the dense model.",
    )


def packed_segments(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    shape: tuple[int, int],
    kwargs: Mapping[str, object],
    *,
    cached: int | None,
) -> torch.Tensor | None:
    """The sample that every token belongs to, where rows are packed with several samples.

    As in the stock model, samples begin where positions restart if there is neither a mask nor a
    cache, or where a padding-free collator's ``cu_seq_lens_q`` puts them.

    Args:
        position_ids: (1 or batch, sequence); or (4, batch, sequence), text positions first; or
            (3, batch, sequence), which carry no sample boundaries; or None.
        attention_mask: The caller's, or None.
        shape: (batch, sequence).
        kwargs: The decoder's other keyword arguments.
        cached: Number of cached tokens; None if keys and values are not kept.

    Returns:
        (batch, sequence) int64, or None if every row is one sample.

    Raises:
        ModelError: Paged attention was requested, sample lengths do not match the row, or packed
            samples follow cached tokens.
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
            f"Expected cumulative sequence lengths of one row that end at its {length} tokens.",
            remedy="Pack all samples of a batch into one row, as DataCollatorWithFlattening does.",
        )
    if len(starts) <= 2:
        return None
    place = torch.arange(length, device=starts.device)
    return torch.bucketize(place, starts[1:].long(), right=True)[None]


def warn_without_images(decoder: nn.Module, probe: LayoutProbe) -> None:
    """Warn, once per model, if a forward has placeholders of images but no images.

    The stock model reads them as text. So does the pruned one, which a user may take for a pruned
    answer about an image. Not meant for a cache with visual tokens: there, prompt lookup proposes
    placeholders of images that were seen. A single token is not looked at: it would be a decode
    step, which must not wait for the device.

    Args:
        decoder: The pruned decoder.
        probe: Watches its model, whose forward is in progress.
    """
    call = probe.read()
    if call is None or call.layout is not None or call.input_ids is None or decoder in _WARNED:
        return
    ids = call.input_ids
    if ids.shape[1] < 2:
        return
    count = int(torch.isin(ids, torch.tensor(probe.token_ids, device=ids.device)).sum())
    if count:
        _WARNED.add(decoder)
        given = "pixel_values or mm_encoder_outputs" if probe.takes_encoded else "pixel_values"
        warnings.warn(
            f"input_ids contain {count} image placeholders, but no images came with them in an "
            f"argument that this model reads ({given}): the placeholders are computed as text, and "
            "nothing is pruned. This is said once.",
            YopoWarning,
            stacklevel=2,
        )


def warn_of_features(
    embeds: torch.Tensor, table: nn.Module, layout: TokenLayout | None, *, takes_encoded: bool
) -> None:
    """Warn if embeddings passed by a caller are not all embeddings of tokens.

    Image features merged in beforehand look like any embedding: where an image begins and what its
    grid is are unknown, so all of it is computed in full.

    Args:
        embeds: (batch, sequence, hidden).
        table: The embedding module.
        layout: Known visual tokens, or None.
        takes_encoded: Whether the model's forward takes encoded images.
    """
    if embeds.shape[1] == 1 or type(table) is not nn.Embedding:
        return  # a decode step, or embeddings that are not plain table rows
    weight = weight_of(table)
    if type(weight.data) is not torch.Tensor or weight.dtype.itemsize not in _INTEGERS:
        return
    known = torch.isin(_hashes(embeds.detach().to(weight)), _hashes(weight.detach()))
    if layout is not None:
        known = known | layout.visual.marks(embeds.shape[1])
    unknown = int((~known).sum())
    if unknown:
        encoded = (
            ", or with mm_encoder_outputs={'image': model.get_image_features(...)} if images are "
            "encoded already"
        )
        warnings.warn(
            f"inputs_embeds contain {unknown} embeddings that match no token. If they are image "
            "features, they are not pruned: the plan needs to know where images are. Pass "
            f"input_ids with pixel_values{encoded if takes_encoded else ''}.",
            stacklevel=2,
        )


def _hashes(rows: torch.Tensor) -> torch.Tensor:
    """One hash per row of (..., width) floating-point rows; equal bits give equal hashes."""
    rows = rows[..., :_HASHED].contiguous()
    bits = rows.view(_INTEGERS[rows.element_size()]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (rows.shape[-1],), generator=generator) | 1
    return (bits * factors.to(bits.device)).sum(dim=-1)


def refuse_captures(config: object, kwargs: dict[str, object], who: str) -> None:
    """Raise ModelError if all layers' hidden states or attentions are requested from ``who``."""
    for what in ("hidden_states", "attentions"):
        flag = f"output_{what}"
        if kwargs.get(flag) or getattr(config, flag, False):
            raise ModelError(
                f"{who} has no {what} of all tokens in all layers.",
                remedy=f"Drop {flag}, or use the dense model.",
            )


def refuse_window(config: object, length: int, who: str) -> None:
    """Raise ModelError if ``length`` exceeds a sliding window, which ``who`` does not support."""
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise ModelError(
            f"{length} tokens exceed the model's sliding attention window of {window}, which "
            f"{who} does not support.",
            remedy="Shorten the prompt or the answer, or use the dense model.",
        )


def checked_mask(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """A padding mask as (batch, length) bool; None if there is no padding.

    Raises:
        ModelError: It has other dimensions.
    """
    if mask is None:
        return None
    found = f"{mask.dim()}-D" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
    if found != "2-D":
        raise ModelError(
            f"A pruned model takes a 2-D attention mask, found {found}.",
            remedy="Pass the padding mask that the processor returns. Packed rows need no mask, "
            "only positions that restart.",
        )
    size = tuple(mask.shape)
    if size != (batch, length):
        raise ModelError(f"The attention mask has shape {size}, expected {(batch, length)}.")
    mask = mask.bool()
    return None if bool(mask.all()) else mask
