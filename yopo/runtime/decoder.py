"""The pruned decoder: a text stream at full width and a visual stream that does less.

The sequence is split once and joined once; no layer gathers or scatters. Text runs through the
ordinary modules. Visual tokens run through the parts that the plan keeps, and are dropped once no
later layer uses them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from yopo.models.baton import each_layer
from yopo.models.devices import device_of, moved
from yopo.models.family import Backbone
from yopo.models.layout import LayoutProbe
from yopo.models.reduced import Reduced, reduce
from yopo.models.streams import Stream, TokenLayout
from yopo.plans.schema import PruningPlan
from yopo.runtime import row_blocks
from yopo.runtime.attention_masks import AttentionMasks
from yopo.runtime.cache import PrunedCacheLayer, adopt, new_layers, place_latents
from yopo.runtime.checkpointing import is_checkpointed, refuse_filled
from yopo.runtime.extent_warning import warn_beyond
from yopo.runtime.gemm import fast_gemm
from yopo.runtime.heads import HeadSplit, split_heads
from yopo.runtime.inputs import (
    packed_segments,
    refuse_captures,
    refuse_window,
    warn_of_features,
    warn_without_images,
)
from yopo.runtime.labels import LabelProbe
from yopo.runtime.layer_loop import Streams, pass_layers
from yopo.runtime.norms import norm_for
from yopo.runtime.replay import Recordings
from yopo.runtime.sliced_linear import warn_without_fitted
from yopo.runtime.token_index import Rotary

if TYPE_CHECKING:
    from yopo.models.stock import ModuleListOf, StockDecoder
    from yopo.runtime.weights import VisualLayer

    _Stock = StockDecoder
else:
    _Stock = object  # mixed into a decoder's class, which provides the rest


class PrunedState(nn.Module):
    """State of a pruned decoder: the plan, the visual parts of its layers, the probes.

    A module, so that its buffers follow ``model.to``; its buffers are not in the state dict. It
    holds no state of a single forward, because threads share it.
    """

    def __init__(
        self,
        plan: PruningPlan,
        layers: ModuleListOf[VisualLayer],
        names: Backbone,
        probe: LayoutProbe,
        labels: LabelProbe,
        *,
        cuda_graphs: bool = True,
    ):
        super().__init__()
        self.plan = plan
        self.visual = layers
        self.names = names
        self.probe = probe
        self.labels = labels
        self.recordings = Recordings() if cuda_graphs else None
        shape = plan.model.shape
        scale = plan.tensors.key_scale if plan.needs_key_scale else None
        scales = [None] * shape.layers if scale is None else scale
        self._splits = [
            split_heads(layer, shape, each) for layer, each in zip(plan.layers, scales, strict=True)
        ]
        self._splits_on: dict[tuple[torch.device, ...], list[HeadSplit]] = {}
        self.register_load_state_dict_pre_hook(warn_without_fitted)

    def splits(self, *devices: torch.device) -> list[HeadSplit]:
        """The head groups of all layers, their positions on the layers' devices (or on one)."""
        if devices not in self._splits_on:
            each = devices * len(self._splits) if len(devices) == 1 else devices
            self._splits_on[devices] = [
                split.to(device) for split, device in zip(self._splits, each, strict=True)
            ]
        return self._splits_on[devices]

    def store_whole(self) -> None:
        """From now on, keep visual keys, values and latents in the model's own numbers."""
        self._splits = [split.unpacked() for split in self._splits]
        self._splits_on.clear()


class PrunedDecoder(_Stock):
    """Forward of a text decoder under a plan; mixed into the decoder's own class.

    Expects ``self.yopo``, a :class:`PrunedState`.
    """

    yopo: PrunedState

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run all layers; arguments as in the stock decoder.

        Returns:
            ``last_hidden_state`` (batch, sequence, hidden), zero at visual tokens that are gone
            before the last layer, and the cache.

        Raises:
            ModelError: Hidden states or attentions of all layers were requested, which do not
                exist for visual tokens; or the cache or attention mask is of an unsupported kind;
                or the tokens exceed a sliding window.
        """
        state = self._modules.get("yopo")
        if not isinstance(state, PrunedState):
            # Another thread left the block since this call began: dense from here.
            return type(self).forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        refuse_captures(self.config, kwargs, "A pruned model")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        layout = moved(_layout(self, state, inputs_embeds), embeds.device)
        attention_mask = moved(attention_mask, embeds.device)
        reduced = reduce(state.plan.reduction, layout, embeds, attention_mask)
        layout = layout if reduced is None else reduced.layout
        kept = _cache(self.layers, past_key_values, use_cache=use_cache)
        splits = state.splits(*map(device_of, self.layers))
        cache = new_layers(splits) if kept is None else adopt(kept, splits)
        batch, length, _ = embeds.shape
        index = cache[0].index
        if not index.num_visual:
            warn_without_images(self, state.probe)
        refuse_window(self.config, index.length + length, "a pruned model")
        past, size = None if kept is None else index.length, (batch, length)
        segments = packed_segments(position_ids, attention_mask, size, kwargs, cached=past)
        positions: torch.Tensor | None = moved(position_ids, embeds.device)
        if positions is None:
            place = torch.arange(length, device=embeds.device) + index.length
            positions = place.expand(batch, -1)
        masks = AttentionMasks(
            layout,
            batch,
            length,
            attention_mask,
            index,
            bidirectional=state.plan.bidirectional,
            device=embeds.device,
            segments=segments,
        )
        positions = rotary_positions(positions, state.names.position_axes)
        rotary = moved(self.rotary_emb(embeds, position_ids=positions), embeds.device)
        stack = state.names.added_features(kwargs)
        hidden = run_layers(self, state, embeds, rotary, masks, cache, stack, reduced)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=kept)


def _cache(
    layers: Iterable[nn.Module], given: DynamicCache | None, *, use_cache: bool | None
) -> DynamicCache | None:
    """The cache of this forward: the caller's or a new one; None if layers run twice."""
    if any(is_checkpointed(layer) for layer in layers):
        refuse_filled(given)
        return None
    return DynamicCache() if use_cache and given is None else given


def _layout(
    decoder: StockDecoder, state: PrunedState, inputs_embeds: torch.Tensor | None
) -> TokenLayout | None:
    """The layout of this forward, which may miss visual tokens in a caller's embeddings."""
    call = state.probe.read()
    layout = None if call is None else call.layout
    warn_beyond(decoder, state.plan.extent, layout)
    if inputs_embeds is not None and (call is None or call.input_ids is None):
        takes_encoded = state.probe.takes_encoded
        warn_of_features(inputs_embeds, decoder.embed_tokens, layout, takes_encoded=takes_encoded)
    return layout


def rotary_positions(position_ids: torch.Tensor, axes: int) -> torch.Tensor:
    """Convert position ids to the shape that the rotary embedding expects.

    Args:
        position_ids: (1 or batch, sequence), or (3, batch, sequence), or (4, batch, sequence) with
            a leading row of text positions, which only packed masks need.
        axes: Position numbers per token.

    Returns:
        (1 or batch, sequence), or (axes, batch, sequence) if there are several.
    """
    if position_ids.dim() == 3:
        return position_ids[-axes:]
    return position_ids if axes == 1 else position_ids.expand(axes, *position_ids.shape)


def run_layers(
    decoder: StockDecoder,
    state: PrunedState,
    embeds: torch.Tensor,
    rotary: Rotary,
    masks: AttentionMasks,
    cache: list[PrunedCacheLayer],
    stack: Sequence[torch.Tensor] = (),
    reduced: Reduced | None = None,
) -> torch.Tensor:
    """Carry both streams through the layers.

    Args:
        decoder: The stock decoder's modules.
        state: The plan and the visual parts of the layers.
        embeds: (batch, sequence, hidden), image features merged in.
        rotary: Cosines and sines, (1 or batch, sequence, head_dim).
        masks: Positions and masks of this forward.
        cache: One cache layer per decoder layer; filled here.
        stack: (visual tokens of all rows, hidden) each, added after the first layers (DeepStack).
        reduced: How the visual tokens got fewer; None: all are there.

    Returns:
        (batch, sequence, hidden) after the final norm.
    """
    streams = _streams(embeds, rotary, masks, stack[: len(state.visual)], reduced)
    if masks.visual is not None:
        place_latents(cache, streams.visual_rotary)
        gone = [] if reduced is None else [reduced.dropped]
        gone += [masks.visual] if state.plan.visual_depth < len(decoder.layers) else []
        for each in gone:  # now, as later the host would wait for all layers
            _warn_of_dropped(state, each, embeds.shape[1])
    states = None
    if state.recordings is not None:
        states = state.recordings.replayed(decoder, state, streams, masks, cache)
    if states is None:
        layers = each_layer(decoder.layers, embeds)
        with fast_gemm(decoder.layers, streams.text):
            states = pass_layers(layers, state.names, state.visual, streams, masks, cache)
    return _joined(decoder.norm, *states, masks, embeds)


def _joined(
    module: nn.Module,
    text: torch.Tensor,
    visual: torch.Tensor | None,
    masks: AttentionMasks,
    embeds: torch.Tensor,
) -> torch.Tensor:
    """(batch, sequence, hidden) of both streams after the final norm, 0 at tokens that are gone."""
    place = device_of(module)
    text, visual = moved((text, visual), place)
    norm = norm_for(module, place)
    text, masks = norm(text), masks.on(place)
    if masks.visual is None:
        return text
    hidden = torch.zeros_like(embeds, device=place)
    masks.text.scatter(hidden, text)
    if visual is not None:
        masks.visual.scatter(hidden, row_blocks.replace(visual, norm))
    return hidden


def _streams(
    embeds: torch.Tensor,
    rotary: Rotary,
    masks: AttentionMasks,
    stack: Sequence[torch.Tensor],
    reduced: Reduced | None,
) -> Streams:
    """What enters the first layer; arguments as for ``run_layers``."""
    stream, batch = masks.visual, embeds.shape[0]
    if stream is None:
        return Streams(embeds, None, rotary, rotary)
    if reduced is None:
        visual = stream.gather(embeds)
    else:
        visual = reduced.features(reduced.whole.gather(embeds))
    added = (_added(each.to(visual), stream, reduced) for each in stack)
    return Streams(
        masks.text.gather(embeds),
        visual,
        _gathered(masks.text, rotary, batch),
        _gathered(stream, rotary, batch),
        tuple(added),
    )


def _added(values: torch.Tensor, stream: Stream, reduced: Reduced | None) -> torch.Tensor:
    """(batch, visual, hidden) of (visual tokens of all rows, hidden), for the stream's tokens."""
    if reduced is None:
        return stream.unflatten(values)
    return reduced.features(reduced.whole.unflatten(values))


def _warn_of_dropped(state: PrunedState, stream: Stream, length: int) -> None:
    """Warn if labels or a next token depend on visual tokens that are gone at the end."""
    state.labels.warn_of_dropped(stream.index, stream.mask)
    if bool((stream.index == length - 1).any()):
        warnings.warn(
            "A prompt ends in an image whose visual tokens the plan drops, so its next-token "
            "logits are meaningless. Put text after the image.",
            stacklevel=3,
        )


def _gathered(stream: Stream, rotary: Rotary, batch: int) -> Rotary:
    """Cosines and sines of one stream, for every batch row."""
    cosines, sines = rotary
    return (
        stream.gather(cosines.expand(batch, -1, -1)),
        stream.gather(sines.expand(batch, -1, -1)),
    )
