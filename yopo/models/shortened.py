"""A stock decoder behind a reduction: it gets shorter prompts, kept tokens at their own positions.

What is measured and fitted for a plan with a reduction has to see the tokens that the plan's layers
will see. The pruned decoder leaves the sequence as it is; a stock one cannot skip tokens, so they
are taken out before its first layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from yopo.models.family import Backbone
from yopo.models.layout import LayoutProbe
from yopo.models.reduced import Reduced, reduce
from yopo.models.streams import TokenLayout, build_layout
from yopo.reduction.method import Method
from yopo.support.errors import ModelError


@dataclass(frozen=True)
class Shortened:
    """A forward of a stock decoder without the dropped tokens.

    Attributes:
        arguments: The decoder's keyword arguments, for the shorter sequence.
        layout: Where its text and its visual tokens are; each image is a column of tokens.
        whole: Where they were before.
        mask: (batch, shorter) attention mask, 0 on padding.
        cells: (batch, visual, 3) int64: (image, row, column) of each visual token, -1 on padding.
    """

    arguments: dict[str, Any]
    layout: TokenLayout
    whole: TokenLayout
    mask: torch.Tensor
    cells: torch.Tensor


def shorten(
    method: Method | None, probe: LayoutProbe, names: Backbone, arguments: Mapping[str, Any]
) -> Shortened | None:
    """Take the tokens that a reduction drops out of a decoder's forward, and out of its layout.

    To be called in a pre-hook of the decoder. The mask is always explicit: without one, stock code
    takes gaps between positions for borders between packed prompts.

    Args:
        method: The reduction, if there is any.
        probe: Has the layout of the forward in progress; from here on, that of what is left.
        names: Names of the decoder's arguments.
        arguments: The decoder's keyword arguments.

    Returns:
        None if all tokens are kept.

    Raises:
        ModelError: The decoder was not given embeddings.
    """
    call = probe.read()
    if method is None or call is None or call.layout is None:
        return None
    embeds, mask, whole = (
        arguments.get("inputs_embeds"),
        arguments.get("attention_mask"),
        call.layout,
    )
    if embeds is None:
        raise ModelError("The decoder was given no embeddings, so no tokens can be dropped.")
    if mask is None or mask.dim() != 2:
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.int64)
    reduced = reduce(method, whole, embeds, mask)
    if reduced is None:
        return None
    length = embeds.shape[1]
    index, remains = _remaining(~reduced.dropped.marks(length))
    is_visual = reduced.layout.visual.marks(length).gather(1, index) & remains
    layout = build_layout(is_visual, reduced.layout.grids)
    short = {
        "inputs_embeds": _rows(_mixed(embeds, reduced), index),
        "attention_mask": mask.gather(1, index) * remains,
        "position_ids": _positions(arguments.get("position_ids"), index, length),
    }
    dropped = {"cache_position": None} if "cache_position" in arguments else {}
    short |= dropped | _stack(names, arguments, reduced, is_visual)
    call.layout = layout
    cells = _cells(whole, reduced)
    return Shortened({**arguments, **short}, layout, whole, short["attention_mask"], cells)


def _remaining(is_kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the (batch, sequence) tokens that stay, in order, and which of them are real: rows
    that keep fewer are padded on the right."""
    counts = is_kept.sum(dim=1)
    most = int(counts.max())
    index = torch.argsort((~is_kept).to(torch.uint8), dim=1, stable=True)[:, :most]
    return index, torch.arange(most, device=index.device) < counts[:, None]


def _rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def _mixed(embeds: torch.Tensor, reduced: Reduced) -> torch.Tensor:
    """(batch, sequence, hidden), the kept tokens' features made of those of all."""
    mixed = embeds.clone()
    reduced.layout.visual.scatter(mixed, reduced.features(reduced.whole.gather(embeds)))
    return mixed


def _positions(positions: torch.Tensor | None, index: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of the tokens that stay: (batch, shorter), or (axes, batch, shorter)."""
    if positions is None:
        return index
    every = positions.expand(*positions.shape[:-2], len(index), length)
    return every.gather(-1, index.expand(*every.shape[:-1], -1))


def _stack(
    names: Backbone, arguments: Mapping[str, Any], reduced: Reduced, is_visual: torch.Tensor
) -> dict[str, Any]:
    """DeepStack's features of the tokens that stay, one layer's at a time."""
    layers = names.added_features(arguments)
    if not layers:
        return {}
    assert names.deepstack is not None, "there are such features"
    mask = reduced.layout.visual.mask
    kept = [reduced.features(reduced.whole.unflatten(each)) for each in layers]
    flat = [each.flatten(0, 1) if mask is None else each[mask] for each in kept]
    return {names.deepstack: flat, "visual_pos_masks": is_visual}


def _cells(whole: TokenLayout, reduced: Reduced) -> torch.Tensor:
    """Cells of the tokens that stay in the images' own grids."""
    before = whole.coordinates()
    cells = before.new_full((*reduced.layout.visual.index.shape, 3), -1)
    for number, row in enumerate(reduced.rows):
        if row:
            kept = torch.cat([each.start + each.kept for each in row])
            cells[number, : len(kept)] = before[number, kept]
    return cells
