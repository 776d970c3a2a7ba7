"""The weights of visual tokens in a layer: slices of its own weights, or small fitted ones.

In a baked checkpoint heads and neurons are in order of importance, so every slice is a prefix and
is used as a view of the original weight. Other selections (an unbaked model in memory, ragged
groups under GQA) are gathered when they are used. Either way visual tokens see the current weights,
trained or adapted. Fitted weights are used only by visual tokens, never by text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from yopo.models.devices import device_of, moved
from yopo.models.family import Backbone
from yopo.models.fingerprint import is_plain
from yopo.plans.schema import LayerPlan, ModelShape, PruningPlan
from yopo.plans.tensors import Refit
from yopo.runtime.adapters import parts_of
from yopo.runtime.heads import split_heads
from yopo.runtime.offload import bias_of, is_fetched, weight_of
from yopo.runtime.sliced_linear import FittedLinear, SlicedLinear, like_that_of
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    from yopo.models.stock import ModuleListOf, StockDecoder, StockLayer


class VisualLayer(nn.Module):
    """The computation of visual tokens in one decoder layer.

    Attributes:
        plan: The layer's plan.
        split: Its head groups.
        reduce: Projection into the bottleneck of queries, keys and values; None without one.
        head_mean: (heads * head_dim,) mean attention output of the heads in which visual tokens do
            not attend, 0 in the others; None without ``mean`` compensation.
        neuron_mean: (ffn,) mean activation of the neurons that they do not use, 0 in the others;
            None without ``mean`` compensation.
    """

    reduce: FittedLinear | None
    query: SlicedLinear | FittedLinear
    key: SlicedLinear | FittedLinear
    value: SlicedLinear | FittedLinear
    output: SlicedLinear | FittedLinear
    gate: SlicedLinear
    up: SlicedLinear
    down: SlicedLinear | FittedLinear
    map_in: FittedLinear
    map_out: FittedLinear
    head_mean: torch.Tensor | None
    neuron_mean: torch.Tensor | None

    def __init__(
        self,
        layer: StockLayer,
        plan: LayerPlan,
        shape: ModelShape,
        names: Backbone,
        extras: Extras,
    ):
        super().__init__()
        self.plan = plan
        self.split = split_heads(plan, shape, extras.key_scale)
        self._holders, self._names = (layer.self_attn, layer.mlp), names
        self._build_projections(shape, extras)
        self._build_output(shape, extras)
        self._build_ffn(shape, extras)
        silent = _silent_heads(extras.head_mean, plan, shape)
        unused = _unused_neurons(extras.neuron_mean, plan, shape, extras.order)
        for name, mean in (("head_mean", silent), ("neuron_mean", unused)):
            self.register_buffer(name, moved(mean, device_of(layer)), persistent=False)

    def _source(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a projection, and the projection's name in it."""
        return self._holders[0 if name in _ATTENTION else 1], getattr(self._names, name)

    def _build_projections(self, shape: ModelShape, extras: Extras) -> None:
        refit = extras.refit
        rows = {"query": _rows(self.split.attending, shape.head_dim)}
        rows["key"] = rows["value"] = _rows(self.plan.kept_kv(shape), shape.head_dim)
        like = like_that_of(getattr(*self._source("key")))
        self.reduce = None
        if "reduce" in refit:
            centred = "reduce_bias" if "reduce_bias" in refit else None
            self.reduce = extras.fitted("reduce", centred, like)
        offsets = _fused_offsets(self._names, shape)
        starts = {"query": 0, "key": offsets[0], "value": offsets[1]}
        for name, kept in rows.items():
            if not len(kept):
                continue
            if self.reduce is None:
                setattr(self, name, SlicedLinear(*self._source(name), kept + starts[name]))
            else:
                setattr(self, name, extras.fitted(name, f"{name}_bias", like))

    def _build_output(self, shape: ModelShape, extras: Extras) -> None:
        if "output" in extras.refit:
            like = like_that_of(getattr(*self._source("output")))
            self.output = extras.fitted("output", "output_bias", like)
        elif self.plan.attend_heads:
            columns = _rows(self.split.attending, shape.head_dim)
            place = self._source("output")
            self.output = SlicedLinear(*place, columns, columns=True, block=shape.head_dim)

    def _build_ffn(self, shape: ModelShape, extras: Extras) -> None:
        count, refit = self.plan.neurons, extras.refit
        like = like_that_of(getattr(*self._source("down")))
        if count:
            order = None if count == shape.ffn else extras.order
            kept = (torch.arange(shape.ffn) if order is None else order)[:count]
            up_start = _fused_offsets(self._names, shape)[2]
            self.gate = SlicedLinear(*self._source("gate"), kept)
            self.up = SlicedLinear(*self._source("up"), kept + up_start)
            if "down" in refit:
                self.down = extras.fitted("down", "ffn_bias", like)
            else:
                self.down = SlicedLinear(*self._source("down"), kept, columns=True)
        if "map_in" in refit:
            self.map_in = extras.fitted("map_in", None, like)
            self.map_out = extras.fitted("map_out", None if count else "ffn_bias", like)

    def fitted_weights(self) -> dict[str, torch.Tensor]:
        """The current fitted weights, by the names of ``plans.tensors.refit_sizes``."""
        found = {}
        for name, module in self.named_children():
            if isinstance(module, FittedLinear):
                found[name] = module.weight
                if module.bias is not None:
                    is_ffn = name in ("down", "map_out")
                    found["ffn_bias" if is_ffn else f"{name}_bias"] = module.bias
        return found

    def attention_bias(self) -> torch.Tensor | None:
        """(hidden,) mean contribution of heads in which visual tokens do not attend, or None."""
        return self._through("output", self.head_mean)

    def ffn_bias(self) -> torch.Tensor | None:
        """(hidden,) mean contribution of neurons that visual tokens do not use, or None."""
        return self._through("down", self.neuron_mean)

    def _through(self, name: str, mean: torch.Tensor | None) -> torch.Tensor | None:
        """Project a mean by the current weight: one row per layer, which ``flops`` omits."""
        if mean is None:
            return None
        source = getattr(*self._source(name))
        weight = weight_of(source)
        mean = mean.to(weight.device, weight.dtype)
        if type(source) is not nn.Linear or not is_plain(weight):
            return source(mean[None])[0]
        own, output = bias_of(source), torch.mv(weight, mean)
        return output if own is None else output + own

    def reduced(self, normed: torch.Tensor) -> torch.Tensor:
        """The input of queries, keys and values: normed states, or their bottleneck."""
        return normed if self.reduce is None else self.reduce(normed)

    def activations(self, normed: torch.Tensor) -> torch.Tensor:
        """(batch, visual, neurons) activations of the kept neurons."""
        activation = getattr(self._holders[1], self._names.activation)
        return activation(self.gate(normed)) * self.up(normed)

    def ffn(self, normed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The visual tokens' FFN of (batch, visual, hidden) normed states, with ``ffn_bias``."""
        if not self.plan.neurons:
            return self.map_out(self.map_in(normed))
        output = self.down(self.activations(normed), bias)
        return output + self.map_out(self.map_in(normed)) if self.plan.map_rank else output


@dataclass(frozen=True)
class Extras:
    """Tensors that one layer's visual part needs in addition to the plan (see ``PlanTensors``).

    Attributes:
        order: (ffn,) neurons from most to least important; None: the weight's own order.
        neuron_mean: (ffn,), or None without ``mean`` compensation.
        head_mean: (heads, head_dim), or None without ``mean`` compensation.
        refit: Fitted weights; for absent ones the layer's own are used.
        trainable: Whether fitted weights are parameters.
        key_scale: (kv_heads, head_dim), needed where keys are quantised.
    """

    order: torch.Tensor | None = None
    neuron_mean: torch.Tensor | None = None
    head_mean: torch.Tensor | None = None
    refit: Refit = field(default_factory=dict)
    trainable: bool = False
    key_scale: torch.Tensor | None = None

    def fitted(self, weight: str, bias: str | None, like: torch.Tensor) -> FittedLinear:
        """A fitted linear layer with the named weights."""
        own = None if bias is None else self.refit[bias]
        return FittedLinear(self.refit[weight], own, like, trainable=self.trainable)

    @classmethod
    def of(cls, plan: PruningPlan, index: int, *, trainable: bool = False) -> Extras:
        """The tensors of one layer of a plan."""
        tensors, compensation = plan.tensors, plan.compensation
        order = _row(tensors.neuron_order, index)
        scale = _row(tensors.key_scale, index)
        if compensation == "mean":
            means = _row(tensors.neuron_mean, index), _row(tensors.head_mean, index)
            return cls(order, *means, key_scale=scale)
        refit = tensors.refit.get(index, {}) if compensation == "refit" else {}
        return cls(order, refit=refit, trainable=trainable, key_scale=scale)


_ATTENTION = ("query", "key", "value", "output")
_FFN = ("gate", "up", "down")


def visual_layers(
    decoder: StockDecoder,
    plan: PruningPlan,
    names: Backbone,
    *,
    trainable: bool = False,
) -> ModuleListOf[VisualLayer]:
    """Build the visual part of every layer up to the plan's visual depth (see ``check_plain``)."""
    shape = plan.model.shape
    layers = nn.ModuleList(
        VisualLayer(
            decoder.layers[index],
            plan.layers[index],
            shape,
            names,
            Extras.of(plan, index, trainable=trainable),
        )
        for index in range(plan.visual_depth)
    )
    return cast("ModuleListOf[VisualLayer]", layers)


def check_plain(decoder: StockDecoder, depth: int, names: Backbone) -> None:
    """Check that the first ``depth`` layers can be cut.

    Raises:
        ModelError: A projection is neither a plain floating-point linear layer in memory nor one
            with plain LoRA (but quantised, otherwise adapted or on no device): slicing its weight
            would compute garbage.
    """
    for index in range(depth):
        _check_layer(decoder.layers[index], index, names)


def _check_layer(layer: StockLayer, index: int, names: Backbone) -> None:
    for part, holder in ((_ATTENTION, layer.self_attn), (_FFN, layer.mlp)):
        for name in part:
            where = f"layer {index}'s {getattr(names, name)}"
            base, _ = parts_of(getattr(holder, getattr(names, name), None), where)
            if base.weight.is_meta and not is_fetched(base):
                raise ModelError(
                    f"{where} has no weights: they are on the meta device, and no hook of "
                    "accelerate fetches them.",
                    remedy="Load them: from_pretrained, with a device_map if they are large.",
                )


def _row(rows: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if rows is None else rows[index]


def _fused_offsets(names: Backbone, shape: ModelShape) -> tuple[int, int, int]:
    """First rows of key, value and up in their projections: 0 unless those are fused."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = (query, query + key) if names.has_fused_attention else (0, 0)
    return *attention, shape.ffn if names.has_fused_ffn else 0


def _rows(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    """Row numbers of heads in a projection's weight."""
    starts = torch.tensor(heads, dtype=torch.int64)[:, None] * head_dim
    return (starts + torch.arange(head_dim)).flatten()


def _silent_heads(
    means: torch.Tensor | None, plan: LayerPlan, shape: ModelShape
) -> torch.Tensor | None:
    """Means of the heads in which visual tokens do not attend, 0 in the others."""
    if means is None or len(plan.attend_heads) == shape.heads:
        return None
    silent = means.clone()
    silent[list(plan.attend_heads)] = 0
    return silent.flatten()


def _unused_neurons(
    means: torch.Tensor | None, plan: LayerPlan, shape: ModelShape, order: torch.Tensor | None
) -> torch.Tensor | None:
    """Means of the neurons that visual tokens do not use, 0 in the others."""
    if means is None or plan.neurons == shape.ffn:
        return None
    order = torch.arange(shape.ffn) if order is None else order
    unused = means.clone()
    unused[order[: plan.neurons]] = 0
    return unused
