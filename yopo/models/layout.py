"""Locates the visual tokens of a batch, once per forward, from the model's inputs.

Nothing is assumed constant: image tokens are located by their id in ``input_ids``, image grids come
from the family's data, and batch rows may differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from yopo.models.family import GridsOf, Run
from yopo.models.image_info import ENCODERS, Info, carried, image_info, known, watched
from yopo.models.streams import TokenLayout, build_layout
from yopo.models.tower_attention import ATTENTION, laid_out, record, recorded
from yopo.support.context import PerContext
from yopo.support.errors import ModelError


@dataclass
class Call:
    """One forward of the base model.

    Attributes:
        layout: Where its visual tokens are; None if it has none.
        input_ids: (batch, sequence) of the caller; None: embeddings were passed instead.
        must_be_read: Whether the layout has to be read before the forward ends.
        is_read: Whether it was read.
        carried: Information carried by images that were encoded before.
    """

    layout: TokenLayout | None
    input_ids: torch.Tensor | None
    must_be_read: bool = False
    is_read: bool = False
    carried: Info = field(default_factory=dict)


class LayoutProbe:
    """Finds the layout of every forward of a multimodal model, with removable hooks.

    A pre-hook on the base model (the module that merges image features into the embeddings) sees
    ``input_ids`` in prefill, decode and ``generate`` alike. ``generate`` encodes images before the
    first forward and drops the processor's information about them, so the encoding methods are
    watched as well. A layout belongs to its call: threads that share the model do not see each
    other's.
    """

    def __init__(
        self,
        base_model: nn.Module,
        grids_of: GridsOf,
        token_ids: Sequence[int] | None = None,
        attention: str | None = None,
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
        self._tower = None if attention is None else base_model.get_submodule(attention)
        if self._tower is not None:
            self._handles.append(record(self._tower))
        for name in ENCODERS:
            if hasattr(base_model, name):
                encode = watched(type(base_model), name, self._key, self._attention)
                setattr(base_model, name, MethodType(encode, base_model))

    @property
    def layout(self) -> TokenLayout | None:
        """The layout of this thread's forward in progress.

        None outside of a forward, and for prompts and decode steps without visual tokens.
        """
        call = _CALLS.get(self)
        return None if call is None else self._with_attention(call).layout

    def read(self) -> Call | None:
        """This thread's forward in progress; marks its layout as read."""
        call = _CALLS.get(self)
        if call is not None:
            self._with_attention(call).is_read = True
        return call

    def _attention(self) -> Info:
        """The tower's attention on the images that were just encoded, where it is recorded."""
        found = None if self._tower is None else recorded(self._tower)
        return {} if found is None else {ATTENTION: found}

    def _with_attention(self, call: Call) -> Call:
        """Add the tower's attention to a layout: a forward may encode its images itself."""
        layout = call.layout
        if self._tower is None or layout is None or layout.attention is not None:
            return call
        found = call.carried.get(ATTENTION, known(self._base_model, self._key).get(ATTENTION))
        if found is not None:
            call.layout = replace(layout, attention=laid_out(found, layout.visual))
        return call

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in ENCODERS:
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
        marked = self._find(module, call.input_ids, embeds, tokens) if tokens else None
        if marked is None:
            return
        found = marked.cpu()  # the host waits for the device once, here
        if bool((found >= 0).any()):
            call.carried = carried(module, bound)
            info = known(module, self._key) | call.carried | image_info(bound)
            grids = self._grids_of(self._config, _runs(found), info)
            layout = build_layout(found >= 0, grids, call.input_ids)
            call.layout = layout.to(marked.device)

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


_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modality -> its argument of the forward; families name their placeholders in this order."""

_CALLS: PerContext[LayoutProbe, Call] = PerContext("yopo_calls")


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
