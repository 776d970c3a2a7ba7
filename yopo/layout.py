"""Where the visual tokens of a batch are, found once per forward from what the model is fed.

Nothing here is a constant: image tokens are located by their id in ``input_ids``, image grids come
from the family's data, and every batch row may differ from the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from yopo.families.family import GridsOf
from yopo.grid import Grid


@dataclass(frozen=True)
class Stream:
    """The positions of one kind of token (text or visual) in a batch.

    Attributes:
        index: (batch, length) int64, positions in the forward's sequence, ascending; rows with
            fewer tokens are padded with position 0.
        mask: (batch, length) bool, False on padding; None if there is none.
        shared: Whether all rows have the same positions.
    """

    index: torch.Tensor
    mask: torch.Tensor | None
    shared: bool

    @property
    def length(self) -> int:
        """Tokens per row, padding included."""
        return self.index.shape[1]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pick this stream's rows of a (batch, sequence, width) tensor."""
        if self.shared:
            return tensor.index_select(1, self.index[0])
        return tensor.gather(1, self.index.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))

    def scatter(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Write (batch, length, width) values back to their positions in ``target``."""
        if self.shared:
            target.index_copy_(1, self.index[0], values)
            return
        rows = torch.arange(target.shape[0], device=target.device).unsqueeze(1)
        rows = rows.expand_as(self.index)
        if self.mask is None:
            target[rows, self.index] = values
        else:
            target[rows[self.mask], self.index[self.mask]] = values[self.mask]


@dataclass(frozen=True)
class TokenLayout:
    """Text and visual tokens of one forward, and the grids of its images.

    Attributes:
        text: Every token that is not visual, attention-mask padding included.
        visual: The visual tokens, images behind one another.
        grids: The image grids of every batch row, in prompt order.
    """

    text: Stream
    visual: Stream
    grids: tuple[tuple[Grid, ...], ...]

    @property
    def has_uniform_grids(self) -> bool:
        """Whether all batch rows hold images of the same grids."""
        return all(row == self.grids[0] for row in self.grids)

    def coordinates(self) -> torch.Tensor:
        """(batch, visual length, 3) int64 of (image, row, column) per visual token; -1: padding."""
        table = torch.full((*self.visual.index.shape, 3), -1, dtype=torch.int64)
        for batch_row, grids in enumerate(self.grids):
            start = 0
            for image, grid in enumerate(grids):
                place = torch.arange(grid.tokens)
                cells = torch.stack(
                    [torch.full_like(place, image), place // grid.cols, place % grid.cols], dim=-1
                )
                table[batch_row, start : start + grid.tokens] = cells
                start += grid.tokens
        return table.to(self.visual.index.device)


def build_layout(is_visual: torch.Tensor, grids: Sequence[tuple[Grid, ...]]) -> TokenLayout:
    """Split a batch into its text and visual streams.

    Args:
        is_visual: (batch, sequence) bool, True on visual tokens.
        grids: Image grids per batch row; their tokens add up to the row's visual tokens.

    Returns:
        The layout, on ``is_visual``'s device.
    """
    visual = _stream(is_visual)
    return TokenLayout(_stream(~is_visual), visual, tuple(tuple(row) for row in grids))


def _stream(member: torch.Tensor) -> Stream:
    counts = member.sum(dim=1)
    length = int(counts.max())
    # A stable sort keeps positions ascending and puts the members of every row first.
    index = torch.argsort((~member).to(torch.uint8), dim=1, stable=True)[:, :length]
    mask = torch.arange(length, device=member.device) < counts.unsqueeze(1)
    if bool(mask.all()):
        return Stream(index, None, shared=bool((index == index[:1]).all()))
    return Stream(index.masked_fill(~mask, 0), mask, shared=False)


class LayoutProbe:
    """Finds the layout of every forward of a multimodal model, with hooks that it can remove.

    A pre-hook on the base model (the module that merges image features into the embeddings) sees
    ``input_ids`` in prefill, decode and ``generate`` alike; images are encoded elsewhere.

    Attributes:
        layout: The layout of the forward in progress; None outside, and for prompts and decode
            steps without a visual token.
    """

    def __init__(self, base_model: nn.Module, grids_of: GridsOf):
        self.layout: TokenLayout | None = None
        self._config: PreTrainedConfig = base_model.config
        self._grids_of = grids_of
        self._signature = inspect.signature(type(base_model).forward)
        self._handles = [
            base_model.register_forward_pre_hook(self._enter, with_kwargs=True),
            base_model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = self._signature.bind_partial(module, *args, **kwargs).arguments
        self.layout, is_visual = None, None
        if _brings_images(bound):
            is_visual = self._find(module, bound.get("input_ids"), bound.get("inputs_embeds"))
        if is_visual is not None and bool(is_visual.any()):
            grids = self._grids_of(self._config, is_visual.sum(dim=1).tolist())
            self.layout = build_layout(is_visual, grids)

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self.layout = None

    def _find(
        self, module: nn.Module, input_ids: torch.Tensor | None, embeds: torch.Tensor | None
    ) -> torch.Tensor | None:
        token = self._config.image_token_id
        if input_ids is not None:
            return input_ids == token if input_ids.shape[1] > 1 else None
        if embeds is None or embeds.shape[1] == 1:
            return None
        embedding = module.get_input_embeddings()
        marker = embedding(torch.tensor(token, device=embeds.device))
        return (embeds == marker).all(dim=-1)


def _brings_images(arguments: dict[str, Any]) -> bool:
    """Whether a forward gets pixels or encoded images (from ``generate``).

    Image tokens without an image are text, as they are to the stock model: prompt lookup proposes
    them when it copies from the prompt.
    """
    encoded = (arguments.get("mm_encoder_outputs") or {}).values()
    pixels = (value for name, value in arguments.items() if name.startswith("pixel_values"))
    return any(value is not None for value in (*encoded, *pixels))
