"""One forward of a baseline: between stock layers, visual tokens leave the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache

from yopo.baselines.baseline import Baseline, Hooks
from yopo.baselines.baseline_cache import BaselineLayer, Stretch
from yopo.baselines.prefill import Between, Decoder, FinishedLayer, Prompt
from yopo.baselines.token_stream import TokenStream, causal_mask, for_attention, spread
from yopo.models.answer_tokens import prompt_ends
from yopo.models.family import Backbone
from yopo.models.layout import LayoutProbe
from yopo.models.streams import TokenLayout
from yopo.runtime.decoder import rotary_positions
from yopo.support.errors import ModelError


@dataclass(eq=False)
class BaselineState:
    """State of a baseline's decoder.

    Attributes:
        method: The baseline.
        names: Names of a layer's modules.
        probe: Finds the visual tokens.
        hooks: The method's hooks on the model.
    """

    method: Baseline
    names: Backbone
    probe: LayoutProbe
    hooks: Hooks


class Run:
    """One forward.

    Args:
        decoder: Its stock parts.
        state: The baseline's state.
        cache: The cache that stock layers append to.
        held: The cache's layers; their record is extended by this forward's tokens.
        layout: Text and visual tokens; None if there is no visual token in this forward.
        real: (batch, cached + length) bool, False on padding; None: no padding.
    """

    def __init__(
        self,
        decoder: Decoder,
        state: BaselineState,
        cache: DynamicCache,
        held: Sequence[BaselineLayer],
        layout: TokenLayout | None,
        real: torch.Tensor | None,
    ):
        self.decoder, self.state = decoder, state
        self.cache, self.held, self.record = cache, held, held[0].record
        self.layout, self.real = layout, real
        self.prompt: Prompt | None = None
        self._masks: dict[int, torch.Tensor | None] = {}

    def __call__(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, stack: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Run the layers.

        Args:
            embeds: (batch, sequence, hidden), image features merged in.
            position_ids: (1 or batch, sequence), or with a leading dimension of several axes.
            stack: (visual tokens of all rows, hidden) each, added after the first layers.

        Returns:
            (batch, sequence, hidden) after the final norm.
        """
        past = self.record.length
        stream = self._enter(embeds, position_ids, stack)
        entered = stream
        for number, layer in enumerate(self.decoder.layers):
            kept = self._kept(number, entered, stream)
            if kept is not None:
                stream = stream.with_visual(kept)
                self._begin(number, stream)
            entered = stream
            hidden = layer(
                stream.hidden,
                attention_mask=self._mask(number, stream),
                position_embeddings=stream.rotary,
                past_key_values=self.cache,
                use_cache=True,
            )
            stream = stream.after(number, hidden)
        normed = self.decoder.norm(stream.hidden)
        if normed.shape[1] == embeds.shape[1]:
            return normed
        places = (stream.places - past)[..., None].expand_as(normed)
        return torch.zeros_like(embeds).scatter_(1, places, normed)

    def _enter(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, stack: Sequence[torch.Tensor]
    ) -> TokenStream:
        """The sequence before the first layer."""
        batch, length, _ = embeds.shape
        record = self.record
        places = torch.arange(length, device=embeds.device).expand(batch, -1) + record.length
        record.length += length
        axes = self.state.names.position_axes
        positions = rotary_positions(position_ids, axes) - record.shift
        if self.layout is None:
            nothing = places[:, :0]
            rotary = self.decoder.rotary_emb(embeds, position_ids=positions)
            stream = TokenStream(embeds, rotary, places, nothing)
        else:
            stream = self._enter_prompt(self.layout, embeds, positions, places, stack)
        if record.stretches:
            for each in record.stretches:
                each.places = torch.cat([each.places, places], dim=1)
            self._masks = {each.first: self._causal(each, places) for each in record.stretches}
        else:
            self._begin(0, stream)
        return stream

    def _enter_prompt(
        self,
        layout: TokenLayout,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        stack: Sequence[torch.Tensor],
    ) -> TokenStream:
        """Prompts with images before the first layer, reduced if the method does that."""
        (batch, length, _), axes = embeds.shape, self.state.names.position_axes
        visual = layout.visual.index
        features = [layout.visual.unflatten(each) for each in stack]
        self.prompt = Prompt(layout, prompt_ends(places, self.real), self.real)
        self._refuse_image_at_the_end(self.prompt)
        self.record.visual = places.gather(1, visual)
        self.state.hooks.enter(visual, length)
        wide = positions.reshape(axes, -1, length).expand(-1, batch, -1)
        reduction = self.state.method.reduce(self.prompt, embeds, wide)
        if reduction is not None:
            short = reduction.shorten(layout, embeds, wide)
            embeds, places = short.embeds, places.gather(1, short.index)
            positions = short.positions if axes > 1 else short.positions[0]
            features = [reduction.merged(each) for each in features]
            visual, self.record.shift = short.visual, reduction.shift
        rotary = self.decoder.rotary_emb(embeds, position_ids=positions)
        added = tuple(spread(each, visual, embeds) for each in features)
        return TokenStream(embeds, rotary, places, visual, added)

    def _kept(self, number: int, entered: TokenStream, stream: TokenStream) -> torch.Tensor | None:
        """(batch, kept) int64, the visual tokens kept for this layer; None: all."""
        if self.prompt is None:
            return None
        previous = None
        if number:
            layer, keys = self.decoder.layers[number - 1], self.held[number - 1].keys
            assert keys is not None, "the previous layer has run"
            previous = FinishedLayer(layer, self.state.names, entered, keys)
        return self.state.method.keep(Between(number, self.prompt, stream, previous))

    def _begin(self, first: int, stream: TokenStream) -> None:
        """Record that layers from this one on hold the stream's tokens."""
        stretch = Stretch(first, stream.places, stream.visual.shape[1])
        before = [each for each in self.record.stretches if each.first < first]
        self.record.stretches = [*before, stretch]
        self._masks[first] = self._causal(stretch, stream.places)

    def _causal(self, stretch: Stretch, places: torch.Tensor) -> torch.Tensor | None:
        is_eager = self.decoder.config._attn_implementation == "eager"
        return causal_mask(places, stretch.places, self.real, is_always=is_eager)

    def _mask(self, number: int, stream: TokenStream) -> torch.Tensor | None:
        stretch = self.record.stretch(number)
        mask = self.state.hooks.attention_mask(
            number,
            self._masks[stretch.first],
            hidden=stream.hidden,
            keys=stretch.places,
            visual=self.record.visual,
            prompt=self.prompt,
        )
        return for_attention(mask, stream.hidden, self.decoder.config._attn_implementation)

    def _refuse_image_at_the_end(self, prompt: Prompt) -> None:
        is_visual = (prompt.layout.visual.index == prompt.ends[:, None]).any()
        if self.state.method.drops_tokens and bool(is_visual):
            raise ModelError(
                "A prompt ends in an image, whose last token a baseline may drop.",
                remedy="Put text after the image.",
            )
