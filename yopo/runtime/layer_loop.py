"""The loop over the decoder's layers: two streams in, two streams out, the cache filled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from yopo.models.devices import device_of, moved
from yopo.runtime.attention_masks import AttentionMasks
from yopo.runtime.cache import PrunedCacheLayer
from yopo.runtime.checkpointing import checkpointed, is_checkpointed
from yopo.runtime.layer import LayerRun, VisualInput
from yopo.runtime.token_index import Rotary

if TYPE_CHECKING:
    from yopo.models.family import Backbone
    from yopo.models.stock import ModuleListOf, StockLayer
    from yopo.runtime.weights import VisualLayer


class Streams(NamedTuple):
    """What enters the first layer.

    Attributes:
        text: (batch, text, hidden).
        visual: (batch, visual, hidden), overwritten where no gradient is recorded; None: no visual
            tokens.
        text_rotary: Cosines and sines of text.
        visual_rotary: Those of visual tokens; of no meaning without any.
        added: (batch, visual, hidden) each, added after the first layers (DeepStack).
    """

    text: torch.Tensor
    visual: torch.Tensor | None
    text_rotary: Rotary
    visual_rotary: Rotary
    added: tuple[torch.Tensor, ...] = ()

    def tensors(self) -> list[torch.Tensor]:
        """All that layers read."""
        if self.visual is None:
            return [self.text, *self.text_rotary]
        return [self.text, *self.text_rotary, self.visual, *self.visual_rotary, *self.added]

    def on(self, tensors: Sequence[torch.Tensor]) -> Streams:
        """The same with other tensors in place of those listed by ``tensors``."""
        text, *rotary = tensors[:3]
        if self.visual is None:
            return Streams(text, None, (rotary[0], rotary[1]), (rotary[0], rotary[1]))
        visual, cosines, sines, *added = tensors[3:]
        return Streams(text, visual, (rotary[0], rotary[1]), (cosines, sines), tuple(added))

    def lengthened(self, count: int) -> Streams:
        """The same with ``count`` rows of zeros after every row's text."""
        if not count:
            return self
        text, cosines, sines = (
            pad(each, (0, 0, 0, count)) for each in (self.text, *self.text_rotary)
        )
        return self._replace(text=text, text_rotary=(cosines, sines))


def pass_layers(
    layers: Iterable[StockLayer],
    names: Backbone,
    parts: ModuleListOf[VisualLayer],
    streams: Streams,
    masks: AttentionMasks,
    cache: Sequence[PrunedCacheLayer],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Carry both streams through the layers.

    Args:
        layers: The stock decoder's.
        names: Names of their modules.
        parts: The modules of visual tokens, one per layer that has any.
        streams: The input of the first layer.
        masks: Positions and masks of this forward.
        cache: One cache layer per decoder layer; filled here.

    Returns:
        (batch, text, hidden), and (batch, visual, hidden) or None if visual tokens are gone.
    """
    text, visual, text_rotary, visual_rotary, added = streams
    for number, layer in enumerate(layers):
        part = parts[number] if number < len(parts) else None
        if part is None:
            visual = None
        place = device_of(layer)
        if place != text.device:
            text, visual, text_rotary, visual_rotary = moved(
                (text, visual, text_rotary, visual_rotary), place
            )
        given = None
        if visual is not None and part is not None:
            given = VisualInput(visual, visual_rotary, part)
        run = LayerRun(layer, names, masks.on(place), cache[number], part)
        if is_checkpointed(layer):
            text, visual = checkpointed(run, text, text_rotary, given)
        else:
            text, visual = run(text, text_rotary, given)
        if visual is not None and number < len(added):
            visual = visual + added[number].to(visual.device)
    return text, visual
