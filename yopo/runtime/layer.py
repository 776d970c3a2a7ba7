"""One decoder layer under a plan: text at full width, visual tokens through their parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

from yopo.models.family import Backbone
from yopo.models.offloaded import at_hand
from yopo.runtime import row_blocks
from yopo.runtime.attention import text_attention, visual_attention
from yopo.runtime.attention_masks import AttentionMasks
from yopo.runtime.buffers import Room
from yopo.runtime.cache import PrunedCacheLayer
from yopo.runtime.norms import Norm, norm_for
from yopo.runtime.reading import Reading
from yopo.runtime.token_index import Rotary
from yopo.runtime.watching import watch
from yopo.runtime.weights import VisualLayer

if TYPE_CHECKING:
    from yopo.models.stock import StockLayer


class VisualInput(NamedTuple):
    """A layer's visual input.

    Attributes:
        states: (batch, visual, hidden).
        rotary: Their cosines and sines.
        part: The modules that they run through in this layer.
    """

    states: torch.Tensor
    rotary: Rotary
    part: VisualLayer


class LayerRun:
    """One layer of one forward.

    Args:
        layer: The stock decoder layer.
        names: Names of the layer's modules.
        masks: Positions and masks.
        cache: The layer's keys and values.
        part: The modules of visual tokens in this layer, by which cached latents become keys and
            values; None after the last layer that has any.
    """

    def __init__(
        self,
        layer: StockLayer,
        names: Backbone,
        masks: AttentionMasks,
        cache: PrunedCacheLayer,
        part: VisualLayer | None = None,
    ):
        self.layer, self.names, self.part = layer, names, part
        self.attention = layer.self_attn
        self.masks, self.cache = masks, cache
        self._rotate = names.rotate

    def afresh(self) -> LayerRun:
        """This run with an empty cache layer."""
        return LayerRun(self.layer, self.names, self.masks, self.cache.empty(), self.part)

    def __call__(
        self, text: torch.Tensor, rotary: Rotary, visual: VisualInput | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run both streams: (batch, text, hidden) and visual tokens, None if there are none.

        Here and in the steps below, visual states change in place where no gradient is recorded.
        Weights that are kept elsewhere are fetched once for both.
        """
        with at_hand(self.layer) if self._is_elsewhere else nullcontext():
            text, mixed = self.attend(text, rotary, visual)
            if visual is None:
                return self.feed_text(text), None
            states = self.add_attention(visual.states, visual.part, mixed)
            return self.feed_text(text), self.feed_visual(states, visual.part)

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the layer's weights have to be fetched, by one of them: asking all takes time."""
        weight = getattr(getattr(self.attention, self.names.output), "weight", None)
        return weight is not None and weight.is_meta

    def attend(
        self, text: torch.Tensor, rotary: Rotary, visual: VisualInput | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run attention and fill the cache.

        Returns:
            Text states after attention, and the attention output of visual tokens, (batch, visual,
            attending heads * head_dim), before projection; None where they do not attend.
        """
        norm = self._norm(self.names.attention_norm, text)
        queries, keys, values = self._project_text(norm(text), rotary)
        self.cache.append(keys, values)
        visual_queries = None
        if visual is not None and visual.part.plan.read_heads:
            visual_queries = self._project_visual(visual)
        reading = Reading(self.cache, self.part, self._placed_keys, is_new=visual is not None)
        scale = self.attention.scaling
        dropout = self.attention.attention_dropout if self.attention.training else 0.0
        if (call := watch()) is not None:
            call(self.attention.layer_idx, queries, reading, self.masks, scale)
        mixed = text_attention(queries, reading, self.masks, scale, dropout)
        mixed = getattr(self.attention, self.names.output)(_join_heads(mixed))
        text = text + self._dropped(0)(mixed)
        if visual is None or visual_queries is None:
            return text, None
        radius = visual.part.plan.radius
        gathered = visual_attention(visual_queries, reading, self.masks, radius, scale, dropout)
        return text, gathered

    def add_attention(
        self, visual: torch.Tensor, part: VisualLayer, mixed: torch.Tensor | None
    ) -> torch.Tensor:
        """Visual states after attention, given the visual output of ``attend``."""
        drop, bias = self._dropped(0), part.attention_bias()
        if mixed is not None:
            return row_blocks.add(visual, lambda _, place: drop(part.output(mixed[place], bias)))
        return visual if bias is None else row_blocks.add(visual, lambda *_: drop(bias))

    def feed_text(self, text: torch.Tensor) -> torch.Tensor:
        """Text states after the FFN."""
        norm = self._norm(self.names.ffn_norm, text)
        return text + self._dropped(1)(self.layer.mlp(norm(text)))

    def feed_visual(self, visual: torch.Tensor, part: VisualLayer) -> torch.Tensor:
        """Visual states after the FFN."""
        norm = self._norm(self.names.ffn_norm, visual)
        drop, bias = self._dropped(1), part.ffn_bias()
        if part.plan.has_ffn:
            return row_blocks.add(
                visual, lambda block, _: drop(part.ffn(row_blocks.mapped(block, norm), bias))
            )
        return visual if bias is None else row_blocks.add(visual, lambda *_: drop(bias))

    def _norm(self, name: str, states: torch.Tensor) -> Norm:
        return norm_for(getattr(self.layer, name), states.device)

    def _dropped(self, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The dropout after attention (0) or FFN (1), where the backbone has one (Phi-3)."""
        dropouts = self.names.residual_dropouts
        return getattr(self.layer, dropouts[number]) if dropouts else _as_it_is

    def _project_text(
        self, normed: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        names, attention = self.names, self.attention
        if names.has_fused_attention:
            fused = _split_heads(getattr(attention, names.query)(normed), attention.head_dim)
            key_heads = fused.shape[1] // (attention.num_key_value_groups + 2)
            query_heads = fused.shape[1] - 2 * key_heads
            queries, keys, values = fused.split((query_heads, key_heads, key_heads), dim=1)
        else:
            queries, keys, values = (
                _split_heads(getattr(attention, name)(normed), attention.head_dim)
                for name in (names.query, names.key, names.value)
            )
        queries, keys = self._place(queries, keys, rotary)
        return queries, keys, values

    def _place(
        self, queries: torch.Tensor, keys: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply per-head norms, where the backbone has them (Qwen3), and rotary positions."""
        if self.names.head_norms is not None:
            of_queries, of_keys = (getattr(self.attention, name) for name in self.names.head_norms)
            queries, keys = of_queries(queries), of_keys(keys)
        return self._rotate(queries, keys, *rotary)

    def _project_visual(self, visual: VisualInput) -> torch.Tensor | None:
        """Fill the cache with visual keys and values.

        Returns:
            (batch, attending heads, visual, head_dim) queries; None where no head attends.
        """
        if visual.part.split.latent_rank:
            return self._project_latent(visual)
        states, rotary, part = visual
        head_dim = self.attention.head_dim
        norm = self._norm(self.names.attention_norm, states)
        batch, length, _ = states.shape
        all_keys, all_values = self.cache.make_room(length)
        all_queries = None
        if part.plan.attend_heads:
            size = (batch, len(part.plan.attend_heads), length, head_dim)
            all_queries = states.new_empty(size)
        for place in row_blocks.blocks(states):
            inputs = part.reduced(row_blocks.mapped(states[place], norm))
            cells = (place[0], slice(None), place[1])
            all_values[cells] = _split_heads(part.value(inputs), head_dim)
            keys = (_split_heads(part.key(inputs), head_dim), all_keys[cells])
            queries = None
            if all_queries is not None:
                queries = (_split_heads(part.query(inputs), head_dim), all_queries[cells])
            self._place_into(queries, keys, (rotary[0][place], rotary[1][place]))
        return all_queries

    def _project_latent(self, visual: VisualInput) -> torch.Tensor | None:
        """Fill the cache with latents; as ``_project_visual`` otherwise."""
        states, rotary, part = visual
        norm = self._norm(self.names.attention_norm, states)
        room, all_queries = self.cache.make_latent_room(states), None
        if part.plan.attend_heads:
            size = (len(states), len(part.plan.attend_heads), states.shape[1])
            all_queries = states.new_empty(*size, self.attention.head_dim)
        for place in row_blocks.blocks(states):
            latent = part.reduced(row_blocks.mapped(states[place], norm))
            room[place[0], :, place[1]] = latent[:, None]
            if all_queries is not None:
                queries = _split_heads(part.query(latent), self.attention.head_dim)
                here = (rotary[0][place], rotary[1][place])
                # The rotary embedding needs keys, even unused ones.
                placed, _ = self._place(queries, queries[:, :1], here)
                all_queries[place[0], :, place[1]] = placed
        return all_queries

    def _placed_keys(self, projected: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """(batch, KV heads, length, head_dim) of projected (batch, length, KV heads * head_dim)."""
        keys = _split_heads(projected, self.attention.head_dim)
        _, placed = self._place(keys[:, :1], keys, rotary)
        return placed

    def _place_into(
        self,
        queries: tuple[torch.Tensor, torch.Tensor] | None,
        keys: tuple[torch.Tensor, Room],
        rotary: Rotary,
    ) -> None:
        """Apply norms and rotary positions to projected queries and keys, piece by piece.

        Args:
            queries: Source and destination, (batch, heads, length, head_dim) each; None where
                visual tokens do not attend.
            keys: Source and destination, of the same form.
            rotary: Cosines and sines, (batch, length, head_dim) each.
        """
        wide = keys[0].transpose(1, 2).flatten(2)
        for rows, span in row_blocks.blocks(wide, row_blocks.PIECE_BYTES):
            cells = (rows, slice(None), span)
            some = keys[0][cells]
            # The rotary embedding needs queries, even unused ones.
            own = some[:, :1] if queries is None else queries[0][cells]
            here = (rotary[0][rows, span], rotary[1][rows, span])
            own, some = self._place(own, some, here)
            keys[1][cells] = some
            if queries is not None:
                queries[1][cells] = own


def _as_it_is(states: torch.Tensor) -> torch.Tensor:
    return states


def _split_heads(projected: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _join_heads(mixed: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, head_dim) -> (batch, length, heads * head_dim)."""
    return mixed.transpose(1, 2).flatten(2)
