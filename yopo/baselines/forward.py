"""One forward of a rival: between stock layers, visual tokens leave the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from yopo.baselines.baseline_cache import Record, Stretch
from yopo.baselines.downsample import downsample, pool_layout
from yopo.baselines.fastv import last_row, most_attended
from yopo.baselines.masked import Masks
from yopo.baselines.settings import Setting
from yopo.baselines.token_stream import TokenStream, causal_mask, for_attention, pick
from yopo.models.family import Backbone
from yopo.models.layout import LayoutProbe, TokenLayout
from yopo.runtime.decoder import rotary_positions
from yopo.support.errors import ModelError


@dataclass(eq=False)
class RivalState:
    """What a rival's decoder carries.

    Attributes:
        setting: What it does.
        names: Of a layer's modules.
        probe: Finds the visual tokens.
        masks: Of the simulated plan; None for the others.
        ends: (batch,) int64, position of the prompts' last tokens in the next forward; None: the
            last real token of each row.
    """

    setting: Setting
    names: Backbone
    probe: LayoutProbe
    masks: Masks | None = None
    ends: torch.Tensor | None = None


class Run:
    """One forward.

    Args:
        decoder: Stock layers and ``rival`` state.
        cache: With the rival's layers, which ``record`` describes.
        record: Extended by this forward's tokens.
        layout: Text and visual tokens; None if there is no visual token in this forward.
        real: (batch, cached + length) bool, False on padding; None: no padding.
    """

    def __init__(
        self,
        decoder: nn.Module,
        cache: DynamicCache,
        record: Record,
        layout: TokenLayout | None,
        real: torch.Tensor | None,
    ):
        self.decoder, self.cache, self.record = decoder, cache, record
        self.layout, self.real = layout, real
        self.state: RivalState = decoder.rival
        self._masks: dict[int, torch.Tensor | None] = {}

    def __call__(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, stack: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Run the layers.

        Args:
            embeds: (batch, sequence, hidden), image features merged in.
            position_ids: (1 or batch, sequence), or several axes of them in front.
            stack: (visual tokens of all rows, hidden) each, added behind the first layers.

        Returns:
            (batch, sequence, hidden) after the final norm.
        """
        past = self.record.length
        stream, added = self._enter(embeds, position_ids, stack)
        before = stream
        for number, layer in enumerate(self.decoder.layers):
            if self._drops_before(number):
                index = self._chosen(number, before, stream)
                stream, added = stream.keep(index), [pick(each, index) for each in added]
                self._begin(number, stream, index.shape[1] - self.layout.text.length)
            before = stream
            hidden = layer(
                stream.hidden,
                attention_mask=self._mask(number, stream),
                position_embeddings=stream.rotary,
                past_key_values=self.cache,
                use_cache=True,
            )
            stream = replace(
                stream, hidden=hidden + added[number] if number < len(added) else hidden
            )
        normed = self.decoder.norm(stream.hidden)
        if stream.hidden.shape[1] == embeds.shape[1]:
            return normed
        places = (stream.places - past)[..., None].expand_as(normed)
        return torch.zeros_like(embeds).scatter_(1, places, normed)

    def _enter(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, stack: Sequence[torch.Tensor]
    ) -> tuple[TokenStream, list[torch.Tensor]]:
        """The sequence in front of the first layer, and what is added to it behind layers."""
        batch, length, _ = embeds.shape
        record, layout, axes = self.record, self.layout, self.state.names.position_axes
        places = torch.arange(length, device=embeds.device).expand(batch, -1) + record.length
        record.length += length
        positions = rotary_positions(position_ids, axes) - record.shift
        if layout is None:
            for each in record.stretches:
                each.places = torch.cat([each.places, places], dim=1)
        else:
            visual = layout.visual.index
            features = [layout.visual.unflatten(each) for each in stack]
            self._refuse_image_at_the_end(self._ends(places))
            record.visual = places.gather(1, visual)
            if self.state.masks is not None:
                self.state.masks.show(visual, length)
            if self.state.setting.name == "downsample":
                wide = positions.reshape(axes, -1, length).expand(-1, batch, -1)
                smaller = downsample(self.state.setting, layout, embeds, wide)
                embeds, places = smaller.embeds, places.gather(1, smaller.index)
                positions = smaller.positions if axes > 1 else smaller.positions[0]
                features = [pool_layout(self.state.setting, layout, each) for each in features]
                visual, record.shift = smaller.visual, smaller.shift
            stack = [_spread(each, visual, embeds) for each in features]
        rotary = self.decoder.rotary_emb(embeds, position_ids=positions)
        stream = TokenStream(embeds, rotary, places)
        if record.stretches:
            self._masks = {each.first: self._causal(each, places) for each in record.stretches}
        else:
            self._begin(0, stream, 0 if layout is None else visual.shape[1])
        return stream, list(stack)

    def _begin(self, first: int, stream: TokenStream, num_visual: int) -> None:
        """From this layer on, the stream's tokens are what layers hold."""
        stretch = Stretch(first, stream.places, num_visual)
        self.record.stretches = [*self.record.stretches[: first > 0], stretch]
        self._masks[first] = self._causal(stretch, stream.places)

    def _causal(self, stretch: Stretch, places: torch.Tensor) -> torch.Tensor | None:
        is_eager = self.decoder.config._attn_implementation == "eager"
        return causal_mask(places, stretch.places, self.real, is_always=is_eager)

    def _mask(self, number: int, stream: TokenStream) -> torch.Tensor | None:
        stretch, masks = self.record.stretch(number), self.state.masks
        mask = self._masks[stretch.first]
        if masks is not None and self.layout is not None:
            mask = masks.prefill_mask(number, self.layout, self.real, stream.hidden)
        elif masks is not None and self.record.visual is not None:
            mask = masks.later_mask(number, self.record.visual, stretch.places, mask)
        return for_attention(mask, stream.hidden, self.decoder.config._attn_implementation)

    def _drops_before(self, number: int) -> bool:
        drops = self.state.setting.name in ("vtw", "fastv")
        return drops and self.layout is not None and number == self.state.setting.layers

    def _chosen(self, number: int, before: TokenStream, stream: TokenStream) -> torch.Tensor:
        """(batch, fewer) int64: all text and the visual tokens that go on into this layer."""
        setting, text = self.state.setting, self.layout.text.index
        count = setting.kept(self.layout.visual.length)
        if not count:
            return text
        row = last_row(
            self.decoder.layers[number - 1],
            self.state.names,
            before.hidden,
            self.cache.layers[number - 1].keys,
            before.rotary,
            self._ends(stream.places),
            self.real,
        )
        chosen = most_attended(row, self.layout, count)
        return torch.cat([text, chosen], dim=1).sort(dim=1).values

    def _ends(self, places: torch.Tensor) -> torch.Tensor:
        """(batch,) int64: the prompts' last tokens."""
        if self.state.ends is not None:
            return self.state.ends
        return places[:, -1] if self.real is None else (places * self.real).amax(dim=1)

    def _refuse_image_at_the_end(self, ends: torch.Tensor) -> None:
        is_visual = (self.layout.visual.index == ends[:, None]).any()
        if self.state.masks is None and bool(is_visual):
            raise ModelError(
                "A prompt ends in an image, whose last token a rival may drop.",
                remedy="Put text behind the image.",
            )


def _spread(values: torch.Tensor, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(batch, visual, hidden) values at their positions in zeros shaped ``like``."""
    places = index[..., None].expand(-1, -1, like.shape[-1])
    return torch.zeros_like(like).scatter_(1, places, values.to(like))
