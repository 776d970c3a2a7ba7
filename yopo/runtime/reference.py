"""The specification of a plan: everything is computed in full and masked. Slow, short, readable.

The fast runtime is tested against this. It has no cache (``generate(use_cache=False)`` feeds the
whole sequence at every step), no streams, no blocks and no slices, and shares none of their code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from yopo.models.family import Backbone, GridsOf
from yopo.models.layout import LayoutProbe
from yopo.models.reduced import Reduced, reduce
from yopo.models.streams import TokenLayout
from yopo.models.tower_attention import attention_path
from yopo.plans.checks import check_tensors
from yopo.plans.schema import LayerPlan, PruningPlan
from yopo.plans.tensors import Refit
from yopo.runtime.install import check_model

if TYPE_CHECKING:
    from yopo.models.stock import StockAttention, StockDecoder, StockFFN


@contextmanager
def reference(
    model: PreTrainedModel,
    plan: PruningPlan,
    *,
    grids_of: GridsOf | None = None,
    check: bool = True,
) -> Iterator[PreTrainedModel]:
    """Run a model under the specification inside a ``with`` block; arguments as for ``pruned``."""
    family, names = check_model(model, plan, check=check)
    check_tensors(plan)
    decoder: StockDecoder = model.get_decoder()
    tokens = family.token_ids(model.config)
    attention = attention_path(plan.reduction, family, model.config)
    probe = LayoutProbe(model.base_model, grids_of or family.grids_of, tokens, attention)

    def forward(
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        embeds = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(embeds.shape[1]).expand(embeds.shape[0], -1)
        if position_ids.dim() == 3:  # M-RoPE, possibly with a leading row of text positions
            position_ids = position_ids[-names.position_axes :]
        elif names.position_axes > 1:
            position_ids = position_ids.expand(names.position_axes, -1, -1)
        stack = names.added_features(kwargs)
        rotary = decoder.rotary_emb(embeds, position_ids=position_ids)
        reduced = reduce(plan.reduction, probe.layout, embeds, attention_mask)
        gone = None if reduced is None else reduced.dropped.marks(embeds.shape[1])
        hidden = embeds if reduced is None else mixed_in(embeds, reduced)
        for number, layer in enumerate(decoder.layers):
            spec = LayerSpec(plan, number, probe.layout, attention_mask, gone)
            normed = layer.input_layernorm(hidden)
            hidden = hidden + spec.attention(layer.self_attn, normed, rotary, names)
            hidden = hidden + spec.ffn(layer.mlp, layer.post_attention_layernorm(hidden))
            if number < len(stack):
                visual = spec.is_visual(hidden)[..., None].expand_as(hidden)
                added = torch.zeros_like(hidden).masked_scatter(visual, stack[number].to(hidden))
                hidden = hidden + (added if reduced is None else mixed_in(added, reduced))
        return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden))

    decoder.forward = forward
    try:
        yield model
    finally:
        del decoder.forward
        probe.remove()


def mixed_in(states: torch.Tensor, reduced: Reduced) -> torch.Tensor:
    """(batch, sequence, width) states, those of kept tokens made of those of all visual ones."""
    changed = states.clone()
    kept = reduced.features(reduced.whole.gather(states))
    reduced.layout.visual.scatter(changed, kept)
    return changed


class LayerSpec:
    """What one layer computes under a plan, over the whole sequence."""

    def __init__(
        self,
        plan: PruningPlan,
        number: int,
        layout: TokenLayout | None,
        attention_mask: torch.Tensor | None,
        gone: torch.Tensor | None = None,
    ):
        self.layer: LayerPlan = plan.layers[number]
        self.gone = gone  # (batch, sequence) bool: visual tokens that the reduction dropped
        self.shape = plan.model.shape
        self.layout, self.padding = layout, attention_mask
        self.bidirectional = plan.bidirectional
        tensors = plan.tensors
        neuron_mean, head_mean = tensors.neuron_mean, tensors.head_mean
        if plan.compensation != "mean":
            neuron_mean = head_mean = None
        self.neuron_mean = None if neuron_mean is None else neuron_mean[number]
        self.head_mean = None if head_mean is None else head_mean[number]
        self.key_scale = tensors.key_scale
        if self.key_scale is not None:
            self.key_scale = self.key_scale[number]
        self.refit: Refit = tensors.refit.get(number, {}) if plan.compensation == "refit" else {}
        self.order = torch.arange(self.shape.ffn)
        if tensors.neuron_order is not None:
            self.order = tensors.neuron_order[number]

    def is_visual(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, sequence) bool."""
        if self.layout is None:
            return torch.zeros(hidden.shape[:2], dtype=torch.bool)
        return self.layout.visual.marks(hidden.shape[1])

    def is_one_of(self, heads: Sequence[int]) -> torch.Tensor:
        """(heads,) bool: whether a query head is in a list."""
        table = torch.zeros(self.shape.heads, dtype=torch.bool)
        table[list(heads)] = True
        return table

    def cells(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, 3): image, row, column of visual tokens; -1 for text."""
        table = torch.full((*hidden.shape[:2], 3), -1)
        if self.layout is not None:
            self.layout.visual.scatter(table, self.layout.coordinates())
        return table

    def allowed(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, heads, queries, keys) bool: who may attend whom, before the softmax."""
        batch, length, _ = hidden.shape
        visual, cells = self.is_visual(hidden), self.cells(hidden)
        reads = self.is_one_of(self.layer.read_heads)[None, :, None, None]
        attends = self.is_one_of(self.layer.attend_heads)[None, :, None, None]
        place = torch.arange(length)
        not_later = (place[None, :] <= place[:, None])[None]
        same_image = cells[:, :, None, 0] == cells[:, None, :, 0]
        near = torch.ones(batch, length, length, dtype=torch.bool)
        if self.layer.radius is not None:
            offset = (cells[:, :, None, 1:] - cells[:, None, :, 1:]).abs()
            near = same_image & (offset.amax(dim=-1) <= self.layer.radius)
        both_visual = visual[:, :, None] & visual[:, None, :]
        visual_order = not_later | (same_image if self.bidirectional else torch.tensor(False))
        key_is_visual = visual[:, None, None, :]
        query_is_visual = visual[:, None, :, None]
        text_key = not_later[:, None] & ~key_is_visual
        text_reads = not_later[:, None] & key_is_visual & ~query_is_visual & reads
        visual_reads = (both_visual & near & visual_order)[:, None] & attends
        allowed = text_key | text_reads | visual_reads
        if self.gone is not None:
            allowed = allowed & ~self.gone[:, None, None, :]
        if self.padding is not None:
            allowed = allowed & self.padding.bool()[:, None, None, :]
        return allowed

    def attention(
        self,
        module: StockAttention,
        normed: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        names: Backbone,
    ) -> torch.Tensor:
        """Attention output (batch, sequence, hidden) of normed states."""
        sizes = [self.shape.heads, self.shape.kv_heads, self.shape.kv_heads]
        if hasattr(module, "qkv_proj"):
            fused = module.qkv_proj(normed).unflatten(-1, (-1, module.head_dim))
            queries, keys, values = fused.split(sizes, dim=2)
        else:
            queries, keys, values = (
                getattr(module, f"{name}_proj")(normed).unflatten(-1, (-1, module.head_dim))
                for name in "qkv"
            )
        if self.layer.qkv_rank is not None:
            kv_heads = self.layer.kept_kv(self.shape)
            queries = self.through_bottleneck("query", self.layer.attend_heads, queries, normed)
            bits = self.layer.latent_bits
            keys = self.through_bottleneck("key", kv_heads, keys, normed, bits)
            values = self.through_bottleneck("value", kv_heads, values, normed, bits)
        if names.head_norms is not None:
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        queries, keys = names.rotate(queries.transpose(1, 2), keys.transpose(1, 2), *rotary)
        values = values.transpose(1, 2)
        visual = self.is_visual(normed)[..., None]
        if self.layer.key_bits is not None:
            assert self.key_scale is not None, "checked with the plan's tensors"
            read = in_few_bits(keys, self.layer.key_bits, self.key_scale[:, None])
            keys = torch.where(visual[:, None], read, keys)
        if self.layer.value_bits is not None:
            read = in_few_bits(values, self.layer.value_bits)
            values = torch.where(visual[:, None], read, values)
        keys = keys.repeat_interleave(self.shape.group, dim=1)
        values = values.repeat_interleave(self.shape.group, dim=1)
        scores = queries @ keys.transpose(-1, -2) * module.scaling
        scores = scores.masked_fill(~self.allowed(normed), float("-inf"))
        mixed = scores.softmax(dim=-1).nan_to_num(0.0) @ values
        mixed = mixed.transpose(1, 2)  # (batch, sequence, heads, head_dim)
        is_silent = ~self.is_one_of(self.layer.attend_heads)[:, None]
        instead = torch.zeros(()) if self.head_mean is None else self.head_mean
        mixed = torch.where(visual[..., None] & is_silent, instead.to(mixed), mixed)
        output = module.o_proj(mixed.flatten(2))
        if "output" in self.refit:
            attending = mixed[:, :, list(self.layer.attend_heads)].flatten(2)
            output = torch.where(visual, self.fitted("output", attending), output)
        elif not self.layer.attend_heads and self.head_mean is None:
            output = output.masked_fill(visual, 0.0)
        return output

    def through_bottleneck(
        self,
        name: str,
        heads: Sequence[int],
        stock: torch.Tensor,
        normed: torch.Tensor,
        bits: int | None = None,
    ) -> torch.Tensor:
        """(batch, sequence, heads, head_dim): visual tokens by fitted weights, from what is read of
        a latent stored in some bits; text unchanged."""
        if not heads:
            return stock
        small = normed @ self.refit["reduce"].to(normed).T
        if "reduce_bias" in self.refit:
            small = small + self.refit["reduce_bias"].to(normed)
        if bits is not None:
            small = in_few_bits(small, bits)
        own = stock.clone()
        own[:, :, list(heads)] = self.fitted(name, small).unflatten(-1, (len(heads), -1))
        return torch.where(self.is_visual(normed)[..., None, None], own, stock)

    def fitted(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """A fitted linear layer."""
        return inputs @ self.refit[name].to(inputs).T + self.refit[f"{name}_bias"].to(inputs)

    def ffn(self, module: StockFFN, normed: torch.Tensor) -> torch.Tensor:
        """FFN output (batch, sequence, hidden) of normed states."""
        visual = self.is_visual(normed)[..., None]
        if hasattr(module, "gate_up_proj"):
            gate, up = module.gate_up_proj(normed).chunk(2, dim=-1)
            activation = module.activation_fn(gate) * up
        else:
            activation = module.act_fn(module.gate_proj(normed)) * module.up_proj(normed)
        is_pruned = torch.zeros(self.shape.ffn, dtype=torch.bool)
        is_pruned[self.order[self.layer.neurons :]] = True
        instead = torch.zeros(()) if self.neuron_mean is None else self.neuron_mean
        activation = torch.where(visual & is_pruned, instead.to(activation), activation)
        output = module.down_proj(activation)
        if "ffn_bias" in self.refit:
            own = self.refit["ffn_bias"].to(output).expand_as(output)
            if "down" in self.refit:
                used = activation[..., self.order[: self.layer.neurons]]
                own = own + used @ self.refit["down"].to(output).T
            if "map_in" in self.refit:
                both = self.refit["map_out"].to(output) @ self.refit["map_in"].to(output)
                own = own + normed @ both.T
            output = torch.where(visual, own, output)
        elif not self.layer.neurons and self.neuron_mean is None:
            output = output.masked_fill(visual, 0.0)
        return output


def in_few_bits(
    numbers: torch.Tensor, bits: int, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """What reading (..., head_dim) numbers gives that were divided by a scale and stored.

    In every group of at most 128 of them the levels are ``2^bits`` equidistant ones around zero. A
    step is ``2^(c / 8 - 20)`` for an integer c: the smallest whose levels reach the largest number,
    or one 3 or 6 (with 4 bits: 3) codes below if that gives a smaller squared error.
    """
    exact = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    scale = torch.ones(()) if scale is None else scale
    scale = scale.to(exact.dtype)
    width = max(each for each in range(1, 129) if numbers.shape[-1] % each == 0)
    groups = (exact / scale).unflatten(-1, (-1, width))
    outermost = (2**bits - 1) / 2
    reaching = groups.abs().amax(dim=-1, keepdim=True) / outermost
    widest = torch.ceil(8 * (torch.log2(reaching) + 20)).clamp(max=255)
    best, least = groups, torch.zeros(())
    for below in {8: [0], 4: [0, 3], 2: [0, 3, 6]}[bits]:
        code = widest - below
        step = torch.where(code > 0, 2 ** (code / 8 - 20), 0.0)
        lower = torch.floor(groups / step.where(step > 0, 1.0)) + 0.5
        read = lower.clamp(-outermost, outermost) * step
        error = (read - groups).square().sum(dim=-1, keepdim=True)
        is_better = (error < least) | (below == 0)
        best, least = torch.where(is_better, read, best), torch.where(is_better, error, least)
    return (best.flatten(-2) * scale).to(numbers.dtype)
