"""Locates the visual tokens of a batch, once per forward, from the model's inputs.

Nothing is assumed constant: image tokens are located by their id in ``input_ids``, image grids come
from the family's data, and batch rows may differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import groupby
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from yopo.models.family import GridsOf, Run
from yopo.plans.grid import Grid
from yopo.support.context import PerContext
from yopo.support.errors import ModelError


@dataclass(frozen=True)
class Stream:
    """The positions of one kind of token (text or visual) in a batch.

    Attributes:
        index: (batch, length) int64, positions in the forward's sequence, ascending; rows with
            fewer tokens are padded with position 0.
        mask: (batch, length) bool, False on padding; None without padding.
        shared: Whether all rows have the same positions.
    """

    index: torch.Tensor
    mask: torch.Tensor | None
    shared: bool

    @property
    def length(self) -> int:
        """Tokens per row, padding included."""
        return self.index.shape[1]

    def by_row(self) -> list[torch.Tensor]:
        """(tokens,) positions of every row, without padding."""
        if self.mask is None:
            return list(self.index)
        return [row[real] for row, real in zip(self.index, self.mask, strict=True)]

    def unflatten(self, values: torch.Tensor) -> torch.Tensor:
        """Arrange (tokens of all rows, width) values as (batch, length, width), 0 on padding."""
        if self.mask is None:
            return values.reshape(*self.index.shape, -1)
        padded = values.new_zeros(*self.index.shape, values.shape[-1])
        padded[self.mask] = values
        return padded

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pick this stream's rows of a (batch, sequence, width) tensor."""
        if self.shared:
            return tensor.index_select(1, self.index[0])
        return tensor.gather(1, self.index.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))

    def marks(self, length: int) -> torch.Tensor:
        """(batch, length) bool, True on the sequence positions of this stream."""
        table = self.index.new_zeros((*self.index.shape[:1], length, 1), dtype=torch.bool)
        self.scatter(table, torch.ones_like(self.index, dtype=torch.bool)[..., None])
        return table[..., 0]

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
        visual: The visual tokens, image after image.
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
        """(batch, visual length, 3) int64: (image, row, column) per visual token, -1 on padding."""
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


@dataclass
class Call:
    """One forward of the base model.

    Attributes:
        layout: Where its visual tokens are; None if it has none.
        input_ids: (batch, sequence) of the caller; None: embeddings were passed instead.
        must_be_read: Whether the layout has to be read before the forward ends.
        is_read: Whether it was read.
    """

    layout: TokenLayout | None
    input_ids: torch.Tensor | None
    must_be_read: bool = False
    is_read: bool = False


class LayoutProbe:
    """Finds the layout of every forward of a multimodal model, with removable hooks.

    A pre-hook on the base model (the module that merges image features into the embeddings) sees
    ``input_ids`` in prefill, decode and ``generate`` alike. ``generate`` encodes images before the
    first forward and drops the processor's information about them, so the encoding methods are
    watched as well. A layout belongs to its call: threads that share the model do not see each
    other's.
    """

    def __init__(
        self, base_model: nn.Module, grids_of: GridsOf, token_ids: Sequence[int] | None = None
    ):
        self.must_be_read = False
        """Whether a forward with visual tokens fails if its layout was not read with :meth:`read`:
        then something kept the decoder from being reached."""
        self._config = cast("PreTrainedModel", base_model).config
        self._grids_of = grids_of
        self.token_ids = tuple(token_ids or (self._config.image_token_id,))
        self._base_model = base_model
        self._signature = inspect.signature(type(base_model).forward)
        self.takes_encoded = "mm_encoder_outputs" in self._signature.parameters  # newer ones do
        self._handles = [
            base_model.register_forward_pre_hook(self._enter, with_kwargs=True),
            base_model.register_forward_hook(self._leave, always_call=True),
        ]
        # Tells this probe's image information from another's. A class, not an object: copying the
        # model copies the probe, but not what its encoding methods hold.
        self._key = type("Key", (), {})
        for name in _ENCODERS:
            if hasattr(base_model, name):
                encode = _watched(type(base_model), name, self._key)
                setattr(base_model, name, MethodType(encode, base_model))

    @property
    def layout(self) -> TokenLayout | None:
        """The layout of this thread's forward in progress.

        None outside of a forward, and for prompts and decode steps without visual tokens.
        """
        call = _CALLS.get(self)
        return None if call is None else call.layout

    def read(self) -> Call | None:
        """This thread's forward in progress; marks its layout as read."""
        call = _CALLS.get(self)
        if call is not None:
            call.is_read = True
        return call

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in _ENCODERS:
            self._base_model.__dict__.pop(name, None)

    def _enter(self, module: PreTrainedModel, args: tuple, kwargs: dict) -> None:
        bound = self._signature.bind_partial(module, *args, **kwargs).arguments
        embeds = bound.get("inputs_embeds")
        call = Call(None, bound.get("input_ids"), self.must_be_read)
        _CALLS.set(self, call)
        tokens = [
            token
            for token, modality in zip(self.token_ids, _PIXELS, strict=False)
            if _brings(bound, modality)
        ]
        found = self._find(module, call.input_ids, embeds, tokens) if tokens else None
        if found is not None and bool((found >= 0).any()):
            info = _known(module, self._key) | _carried(bound) | _image_info(bound)
            grids = self._grids_of(self._config, _runs(found), info)
            call.layout = build_layout(found >= 0, grids)

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        call = _CALLS.get(self)
        _CALLS.set(self, None)
        if output is None or call is None or call.layout is None or call.is_read:
            return  # no output: the forward failed for another reason
        # Check both: another thread may have entered or left a block since the call began.
        if call.must_be_read and self.must_be_read:
            raise ModelError(
                "The pruned decoder was not reached: something runs in its place and computed the "
                "dense model's answer.",
                remedy="Find what replaces the decoder's forward (a compiled or wrapped one), and "
                "prune before you compile or wrap.",
            )

    def _find(
        self,
        module: PreTrainedModel,
        input_ids: torch.Tensor | None,
        embeds: torch.Tensor | None,
        placeholders: Sequence[int],
    ) -> torch.Tensor | None:
        """(batch, sequence) int64: the placeholder id on visual tokens, -1 elsewhere."""
        tokens = input_ids if input_ids is not None else embeds
        if tokens is None:
            return None
        found = torch.full(tokens.shape[:2], -1, dtype=torch.int64, device=tokens.device)
        for token in placeholders:
            if input_ids is not None:
                is_token = input_ids == token
            else:
                embedding = module.get_input_embeddings()
                marker = embedding(torch.tensor(token, device=tokens.device))
                is_token = (embeds == marker).all(dim=-1)
            found.masked_fill_(is_token, token)
        return found


_ENCODERS = ("get_image_features", "get_video_features")
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modality -> its argument of the forward; families name their placeholders in this order."""

_CALLS: PerContext[LayoutProbe, Call] = PerContext("yopo_calls")

_Info = dict[str, torch.Tensor]

_IMAGE_INFO: PerContext[nn.Module, tuple[type, _Info]] = PerContext("yopo_image_info")
"""Information passed to a base model's encoding methods about the images encoded last, and the
key of the probe that recorded it."""

_NOTE = "_yopo_image_info"
"""Attribute of an encoding method's output with the same. Copies of the output (beams) lose it."""


def _image_info(arguments: dict[str, Any]) -> _Info:
    """The arguments about images other than their pixels."""
    about = ("image_", "video_", "batch_num_images")
    return {
        name: value
        for name, value in arguments.items()
        if name.startswith(about) and isinstance(value, torch.Tensor)
    }


def _known(module: nn.Module, key: type) -> _Info:
    """Information about the images encoded last, if this probe recorded it."""
    of, info = _IMAGE_INFO.get(module) or (None, {})
    return info if of is key else {}


def _carried(arguments: dict[str, Any]) -> _Info:
    """Information carried by the encoded images among a forward's arguments."""
    info: _Info = {}
    for output in (arguments.get("mm_encoder_outputs") or {}).values():
        info |= getattr(output, _NOTE, {})
    return info


def _watched(owner: type[nn.Module], name: str, key: type) -> Callable[..., Any]:
    """The owner's encoding method, wrapped to record the information about its images."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    @wraps(original)
    def encode(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        passed = _image_info(signature.bind_partial(module, *args, **kwargs).arguments)
        known = _known(module, key)
        encoded = original(module, *args, **kwargs)
        # After the call: Qwen3-VL encodes videos as images, which must not count as such.
        _IMAGE_INFO.set(module, (key, known | passed))
        if isinstance(encoded, ModelOutput):
            setattr(encoded, _NOTE, passed)
        return encoded

    return encode


def _runs(found: torch.Tensor) -> list[list[Run]]:
    """Visual runs per batch row of (batch, sequence) placeholder ids (-1: text)."""
    return [
        [(token, len(list(run))) for token, run in groupby(row) if token >= 0]
        for row in found.tolist()
    ]


def _brings(arguments: dict[str, Any], modality: str) -> bool:
    """Whether a forward gets pixels or encoded images (from ``generate``) of a modality.

    Placeholders without an image are text, as in the stock model: prompt lookup proposes them when
    it copies from the prompt, and a model may generate one itself.
    """
    encoded = arguments.get("mm_encoder_outputs") or {}
    return any(
        value is not None for value in (arguments.get(_PIXELS[modality]), encoded.get(modality))
    )
