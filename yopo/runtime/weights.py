"""What visual tokens compute in a layer: parts of its weights, or small weights of their own.

In a baked checkpoint heads and neurons stand in order of importance, so every part is a prefix and
is used as a view of the original weight: no copy, and it follows ``model.to``. Other selections
(an unbaked model in memory, ragged groups under GQA) are copied once. Fitted weights belong to
visual tokens alone; text never meets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import linear

from yopo.errors import ModelError
from yopo.families.family import Backbone
from yopo.families.fingerprint import is_plain
from yopo.plan import LayerPlan, ModelShape, Plan
from yopo.plan_tensors import PlanTensors, Refit
from yopo.runtime.heads import split_heads
from yopo.runtime.offload import parameter
from yopo.runtime.packed import PackedPart, unpacked


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
        self._packed = PackedPart(keep, columns=columns)
        full = source.in_features if columns else source.out_features
        first = int(keep[0])
        self._span = slice(first, first + len(keep))
        if torch.equal(keep, torch.arange(self._span.start, self._span.stop)):
            self._is_all = len(keep) == full and bias is None
            weight = own_bias = None
        else:
            place = keep.to(source.weight.device)
            weight = unpacked(source.weight).index_select(1 if columns else 0, place)
            own_bias = None
            if source.bias is not None and not columns:
                own_bias = source.bias.detach().index_select(0, place)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias if columns else own_bias, persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply to (..., kept inputs or all inputs) and return (..., outputs)."""
        if self._is_all:
            return self._source[0](inputs)
        return linear(inputs, *self.matrix())

    def matrix(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight, (outputs, inputs), and the bias, (outputs,) or None."""
        source, weight, bias = self._source[0], self.weight, self.bias
        if weight is None:
            weight = self._cut(parameter(source, "weight"))
            if not self._columns:
                bias = parameter(source, "bias")
                bias = None if bias is None else bias[self._span]
        if self._columns and bias is None:
            bias = parameter(source, "bias")
        return weight, bias

    def _cut(self, full: torch.Tensor) -> torch.Tensor:
        if not is_plain(full):
            return self._packed.cut(full)
        return full[:, self._span] if self._columns else full[self._span]


class Fitted(nn.Module):
    """A fitted linear layer, in the precision and on the device of the layer that it stands for."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight.to(like), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(like), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply to (..., inputs) and return (..., outputs)."""
        return linear(inputs, self.weight, self.bias)


class VisualLayer(nn.Module):
    """What visual tokens compute in one decoder layer.

    Attributes:
        plan: The layer's plan.
        split: Its head groups.
        reduce: Into the bottleneck of queries, keys and values; None without one.
        attention_bias: (hidden,) added where attention is skipped, or None.
        ffn_bias: (hidden,) added where the FFN is skipped, or None.
    """

    def __init__(
        self,
        layer: nn.Module,
        plan: LayerPlan,
        shape: ModelShape,
        names: Backbone,
        extras: Extras,
    ):
        super().__init__()
        self.plan = plan
        self.split = split_heads(plan, shape)
        self._mlp = (layer.mlp,)
        self._activation = names.activation
        parts = {name: getattr(layer.self_attn, getattr(names, name)) for name in _ATTENTION}
        parts |= {name: getattr(layer.mlp, getattr(names, name)) for name in _FFN}
        attention_bias = _attention_bias(parts["output"], plan, shape, extras.head_mean)
        ffn_bias = _ffn_bias(parts["down"], plan, shape, extras)
        offsets = _fused_offsets(names, shape)
        self._build_projections(parts, shape, offsets, extras.refit)
        self._build_output(parts["output"], shape, extras.refit, attention_bias)
        self._build_ffn(parts, shape, offsets[2], extras, ffn_bias)
        self.register_buffer(
            "attention_bias", None if plan.attend else attention_bias, persistent=False
        )
        self.register_buffer("ffn_bias", None if plan.has_ffn else ffn_bias, persistent=False)

    def _build_projections(
        self,
        parts: dict[str, nn.Linear],
        shape: ModelShape,
        offsets: tuple[int, int, int],
        refit: Refit,
    ) -> None:
        rows = {"query": _rows(self.split.attending, shape.head_dim)}
        rows["key"] = rows["value"] = _rows(self.plan.kept_kv(shape), shape.head_dim)
        like = parts["key"].weight
        self.reduce = Fitted(refit["reduce"], None, like) if "reduce" in refit else None
        starts = {"query": 0, "key": offsets[0], "value": offsets[1]}
        for name, kept in rows.items():
            if not len(kept):
                continue
            if self.reduce is None:
                part = Part(parts[name], kept + starts[name])
            else:
                part = Fitted(refit[name], refit[f"{name}_bias"], like)
            setattr(self, name, part)

    def _build_output(
        self, source: nn.Linear, shape: ModelShape, refit: Refit, bias: torch.Tensor | None
    ) -> None:
        if "output" in refit:
            self.output = Fitted(refit["output"], refit["output_bias"], source.weight)
        elif self.plan.attend:
            columns = _rows(self.split.attending, shape.head_dim)
            self.output = Part(source, columns, columns=True, bias=bias)

    def _build_ffn(
        self,
        parts: dict[str, nn.Linear],
        shape: ModelShape,
        up_start: int,
        extras: Extras,
        bias: torch.Tensor | None,
    ) -> None:
        count, refit, like = self.plan.neurons, extras.refit, parts["down"].weight
        if count:
            is_as_it_stands = extras.order is None or count == shape.ffn
            kept = torch.arange(shape.ffn) if is_as_it_stands else extras.order
            kept = kept[:count]
            self.gate, self.up = Part(parts["gate"], kept), Part(parts["up"], kept + up_start)
            if "down" in refit:
                self.down = Fitted(refit["down"], refit["ffn_bias"], like)
            else:
                self.down = Part(parts["down"], kept, columns=True, bias=bias)
        if "map_in" in refit:
            self.map_in = Fitted(refit["map_in"], None, like)
            self.map_out = Fitted(refit["map_out"], None if count else refit["ffn_bias"], like)

    def reduced(self, normed: torch.Tensor) -> torch.Tensor:
        """What queries, keys and values are computed from: normed states, or their bottleneck."""
        return normed if self.reduce is None else self.reduce(normed)

    def activations(self, normed: torch.Tensor) -> torch.Tensor:
        """(batch, visual, neurons) activations of the kept neurons."""
        activation = getattr(self._mlp[0], self._activation)
        return activation(self.gate(normed)) * self.up(normed)

    def ffn(self, normed: torch.Tensor) -> torch.Tensor:
        """What takes the FFN's place, of (batch, visual, hidden) normed states."""
        output = None
        if self.plan.neurons:
            output = self.down(self.activations(normed))
        if self.plan.linear:
            mapped = self.map_out(self.map_in(normed))
            output = mapped if output is None else output + mapped
        return output


@dataclass(frozen=True)
class Extras:
    """What one layer's visual part needs beside the plan (see ``PlanTensors``).

    Attributes:
        order: (ffn,) neurons from most to least important; None: as they stand.
        neuron_mean: (ffn,), or None without ``mean`` compensation.
        head_mean: (heads, head_dim), likewise.
        refit: Fitted weights; those that are absent are taken from the layer's own.
    """

    order: torch.Tensor | None = None
    neuron_mean: torch.Tensor | None = None
    head_mean: torch.Tensor | None = None
    refit: Refit = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: PlanTensors, index: int, compensation: str) -> Extras:
        """Pick one layer's."""
        order = None if tensors.neuron_order is None else tensors.neuron_order[index]
        if compensation == "mean":
            return cls(order, tensors.neuron_mean[index], tensors.head_mean[index])
        return cls(order, refit=tensors.refit.get(index, {}) if compensation == "refit" else {})


_ATTENTION = ("query", "key", "value", "output")
_FFN = ("gate", "up", "down")


def visual_layers(
    decoder: nn.Module, plan: Plan, tensors: PlanTensors | None, names: Backbone
) -> nn.ModuleList:
    """Build the visual part of every layer up to the plan's visual depth, as ``check_plain``ed."""
    tensors, shape = tensors or PlanTensors(), plan.model.shape
    return nn.ModuleList(
        VisualLayer(
            decoder.layers[index],
            plan.layers[index],
            shape,
            names,
            Extras.of(tensors, index, plan.compensation),
        )
        for index in range(plan.visual_depth)
    )


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
                    remedy="Merge adapters; quantize with torchao, whose weights can be cut: "
                    "yopo.load(..., quantization_config=TorchAoConfig(Int8WeightOnlyConfig())).",
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
    silent = [head for head in range(shape.heads) if head not in plan.attend]
    if means is None or not silent:
        return None
    return _mean_output(output, _rows(silent, shape.head_dim), means.flatten())


def _ffn_bias(
    down: nn.Linear, plan: LayerPlan, shape: ModelShape, extras: Extras
) -> torch.Tensor | None:
    """Mean contribution of the pruned neurons; (hidden,) or None."""
    if extras.neuron_mean is None or plan.neurons == shape.ffn:
        return None
    pruned = torch.arange(shape.ffn) if extras.order is None else extras.order
    return _mean_output(down, pruned[plan.neurons :], extras.neuron_mean)


def _mean_output(source: nn.Linear, columns: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    weight = unpacked(source.weight)
    columns = columns.to(weight.device)
    precise = torch.promote_types(weight.dtype, torch.float32)
    used = weight.index_select(1, columns).to(precise)
    bias = used @ means.to(weight.device, precise)[columns]
    if source.bias is not None:
        bias += source.bias.detach().to(precise)
    return bias.to(weight.dtype)
