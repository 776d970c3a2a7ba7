"""The part of a layer's weights that visual tokens still use, beside the untouched originals.

In a baked checkpoint heads and neurons stand in order of importance, so every part is a prefix and
is used as a view of the original weight: no copy, and it follows ``model.to``. Other selections
(an unbaked model in memory, ragged groups under GQA) are copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from yopo.errors import ModelError
from yopo.families.family import Backbone
from yopo.plan import LayerPlan, ModelShape, Plan
from yopo.plan_tensors import PlanTensors
from yopo.runtime.heads import split_heads


class Part(nn.Module):
    """A linear layer restricted to some outputs (rows) or some inputs (columns) of another.

    Args:
        source: The full layer; not registered here, so state dicts stay as they are.
        keep: The kept rows or columns, in their order of use; consecutive ones are a view.
        columns: Whether ``keep`` selects inputs rather than outputs.
        bias: (out_features,) added to the output instead of the source's bias; columns only.
    """

    def __init__(
        self,
        source: nn.Linear,
        keep: torch.Tensor,
        *,
        columns: bool = False,
        bias: torch.Tensor | None = None,
    ):
        super().__init__()
        self._source = (source,)
        self._columns = columns
        self._is_all = False
        full = source.in_features if columns else source.out_features
        first = int(keep[0])
        self._span = slice(first, first + len(keep))
        if torch.equal(keep, torch.arange(self._span.start, self._span.stop)):
            self._is_all = len(keep) == full and bias is None
            weight = own_bias = None
        else:
            place = keep.to(source.weight.device)
            weight = source.weight.detach().index_select(1 if columns else 0, place)
            own_bias = None
            if source.bias is not None and not columns:
                own_bias = source.bias.detach().index_select(0, place)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias if columns else own_bias, persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply to (..., kept inputs or all inputs) and return (..., outputs)."""
        source = self._source[0]
        if self._is_all:
            return source(inputs)
        weight, bias = self.weight, self.bias
        if weight is None and self._columns:
            weight = source.weight[:, self._span]
        elif weight is None:
            weight = source.weight[self._span]
            bias = None if source.bias is None else source.bias[self._span]
        if self._columns and bias is None:
            bias = source.bias
        return linear(inputs, weight, bias)


class VisualLayer(nn.Module):
    """What visual tokens compute in one decoder layer.

    Attributes:
        plan: The layer's plan.
        split: Its head groups.
        attention_bias: (hidden,) added where attention is skipped, or None.
        ffn_bias: (hidden,) added where the FFN is skipped, or None.
    """

    def __init__(
        self,
        layer: nn.Module,
        plan: LayerPlan,
        shape: ModelShape,
        names: Backbone,
        means: Means,
        order: torch.Tensor | None,
    ):
        super().__init__()
        self.plan = plan
        self.split = split_heads(plan, shape)
        self._mlp = (layer.mlp,)
        parts = {name: getattr(layer.self_attn, getattr(names, name)) for name in _ATTENTION}
        parts |= {name: getattr(layer.mlp, getattr(names, name)) for name in _FFN}
        rows = _rows(self.split.kept, shape.head_dim)
        kv_rows = _rows(plan.kept_kv(shape), shape.head_dim)
        attention_bias = _attention_bias(parts["output"], plan, shape, means.heads)
        ffn_bias = _ffn_bias(parts["down"], plan, shape, means.neurons, order)
        key_start, value_start, up_start = _fused_offsets(names, shape)
        self._activation = names.activation
        if plan.heads:
            self.key = Part(parts["key"], kv_rows + key_start)
            self.value = Part(parts["value"], kv_rows + value_start)
        if plan.attend:
            self.query = Part(parts["query"], rows)
            self.output = Part(parts["output"], rows, columns=True, bias=attention_bias)
            attention_bias = None
        if plan.neurons:
            kept = torch.arange(shape.ffn) if order is None else order
            # Use in ascending order of the checkpoint when all are kept: then nothing is copied.
            kept = kept[: plan.neurons].sort().values
            self.gate, self.up = Part(parts["gate"], kept), Part(parts["up"], kept + up_start)
            self.down = Part(parts["down"], kept, columns=True, bias=ffn_bias)
            ffn_bias = None
        self.register_buffer("attention_bias", attention_bias, persistent=False)
        self.register_buffer("ffn_bias", ffn_bias, persistent=False)

    def ffn(self, hidden: torch.Tensor) -> torch.Tensor:
        """The FFN over kept neurons of (batch, visual, hidden) normed states."""
        activation = getattr(self._mlp[0], self._activation)
        return self.down(activation(self.gate(hidden)) * self.up(hidden))


@dataclass(frozen=True)
class Means:
    """One layer's compensation means (see ``PlanTensors``); None without compensation."""

    neurons: torch.Tensor | None
    heads: torch.Tensor | None


_ATTENTION = ("query", "key", "value", "output")
_FFN = ("gate", "up", "down")


def visual_layers(
    decoder: nn.Module, plan: Plan, tensors: PlanTensors | None, names: Backbone
) -> nn.ModuleList:
    """Build the visual part of every layer up to the plan's visual depth, as ``check_plain``ed."""
    layers, tensors = [], tensors or PlanTensors()
    for index in range(plan.visual_depth):
        layer = decoder.layers[index]
        means = Means(None, None)
        if plan.compensation == "mean":
            means = Means(tensors.neuron_mean[index], tensors.head_mean[index])
        order = None if tensors.neuron_order is None else tensors.neuron_order[index]
        shape = plan.model.shape
        layers.append(VisualLayer(layer, plan.layers[index], shape, names, means, order))
    return nn.ModuleList(layers)


def check_plain(decoder: nn.Module, depth: int, names: Backbone) -> None:
    """Check that the first ``depth`` layers can be cut.

    Raises:
        ModelError: A projection is no plain floating-point linear layer in memory (quantised,
            adapted or offloaded): slicing its weight would compute garbage. Or the decoder lies on
            several devices: both streams would have to follow it.
    """
    for index in range(depth):
        _check_layer(decoder.layers[index], index, names)
    devices = sorted({str(weight.device) for weight in decoder.parameters()})
    if len(devices) > 1 and "meta" not in devices:
        raise ModelError(
            f"The decoder lies on several devices ({', '.join(devices)}), expected one.",
            remedy="Load with a device_map that keeps the decoder on one device.",
        )


def _check_layer(layer: nn.Module, index: int, names: Backbone) -> None:
    for part, holder in ((_ATTENTION, layer.self_attn), (_FFN, layer.mlp)):
        for name in part:
            module = getattr(holder, getattr(names, name))
            where = f"layer {index}'s {getattr(names, name)}"
            if type(module) is not nn.Linear or not module.weight.is_floating_point():
                raise ModelError(
                    f"{where} is a {type(module).__name__}, expected a plain linear layer.",
                    remedy="Merge adapters and prune before quantising.",
                )
            if module.weight.is_meta:
                raise ModelError(
                    f"{where} is offloaded to disk or CPU by accelerate, expected in memory.",
                    remedy="Load with a device_map that keeps the decoder on real devices.",
                )


def _fused_offsets(names: Backbone, shape: ModelShape) -> tuple[int, int, int]:
    """Rows in front of key, value and up in their projections: 0 unless those are fused."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = (query, query + key) if names.has_fused_attention else (0, 0)
    return *attention, shape.ffn if names.has_fused_ffn else 0


def _rows(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    """Row numbers of heads in a projection's weight."""
    starts = torch.tensor(heads, dtype=torch.int64)[:, None] * head_dim
    return (starts + torch.arange(head_dim)).flatten()


def _attention_bias(
    output: nn.Linear, plan: LayerPlan, shape: ModelShape, means: torch.Tensor | None
) -> torch.Tensor | None:
    """Mean contribution of the heads in which visual tokens do not attend; (hidden,) or None."""
    silent = [head for head in range(shape.heads) if not plan.attend or head not in plan.heads]
    if means is None or not silent:
        return None
    return _mean_output(output, _rows(silent, shape.head_dim), means.flatten())


def _ffn_bias(
    down: nn.Linear,
    plan: LayerPlan,
    shape: ModelShape,
    means: torch.Tensor | None,
    order: torch.Tensor | None,
) -> torch.Tensor | None:
    """Mean contribution of the pruned neurons; (hidden,) or None."""
    if means is None or plan.neurons == shape.ffn:
        return None
    pruned = torch.arange(shape.ffn) if order is None else order
    return _mean_output(down, pruned[plan.neurons :], means)


def _mean_output(source: nn.Linear, columns: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    weight = source.weight.detach()
    columns = columns.to(weight.device)
    precise = torch.promote_types(weight.dtype, torch.float32)
    used = weight.index_select(1, columns).to(precise)
    bias = used @ means.to(weight.device, precise)[columns]
    if source.bias is not None:
        bias += source.bias.detach().to(precise)
    return bias.to(weight.dtype)
