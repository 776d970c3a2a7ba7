"""What visual rows run through in place of a layer's own modules, on one rank.

The linear layers are vLLM's, so they use the same kernels as the text's. Their weights are fitted
ones, or copies of the heads and neurons that the plan keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ReplicatedLinear

from yopo.plans.layer_plan import LayerPlan, ModelShape
from yopo.plans.tensors import Refit
from yopo.serving.vllm.shard import Shard

Run = tuple[int, int]
"""Consecutive columns: first, one past the last."""


def head_runs(heads: Sequence[int], own: range, head_dim: int) -> list[Run]:
    """The columns of some of a rank's heads, as runs of consecutive ones."""
    runs: list[Run] = []
    for head in heads:
        if head not in own:
            continue
        start, stop = (head - own.start) * head_dim, (head - own.start + 1) * head_dim
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def columns(runs: Sequence[Run]) -> torch.Tensor:
    """The columns of runs, one by one."""
    return torch.cat([torch.arange(*run) for run in runs] or [torch.arange(0)])


def linear(inputs: int, outputs: int, *, bias: bool = False) -> ReplicatedLinear:
    """An unquantized linear layer that no rank shares."""
    return ReplicatedLinear(inputs, outputs, bias=bias, return_bias=False, disable_tp=True)


class VisualQKV(nn.Module):
    """Queries of the attending heads, keys and values, through the bottleneck if there is one.

    Args:
        layer: The layer's plan, with all heads reading.
        shape: The decoder's dimensions.
        shard: This rank.
        bias: Whether the layer's own projection has a bias.
    """

    def __init__(self, layer: LayerPlan, shape: ModelShape, shard: Shard, *, bias: bool):
        super().__init__()
        heads, kv_heads = shard.heads(shape.heads), shard.kv_heads(shape.kv_heads)
        queries, keys = (len(each) * shape.head_dim for each in (heads, kv_heads))
        self.width = queries + 2 * keys
        self.runs = head_runs(layer.attend_heads, heads, shape.head_dim)
        self.runs = [*self.runs, (queries, self.width)]
        if self.runs[0] == (0, queries):
            self.runs = [(0, self.width)]
        self.kept = columns(self.runs)
        self.fitted = [
            _rows_of(layer.attend_heads, heads, shape.head_dim),
            _rows_of(range(shape.kv_heads), kv_heads, shape.head_dim),
        ]
        rank = layer.qkv_rank
        self.reduce = None if rank is None else linear(shape.hidden, rank)
        self.expand = linear(rank or shape.hidden, len(self.kept), bias=bias or rank is not None)

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """(visual, hidden) -> (visual, queries + keys + values), zero in heads not attending."""
        found = self.expand(normed if self.reduce is None else self.reduce(normed))
        if len(self.runs) == 1 and self.runs[0] == (0, self.width):
            return found
        whole, start = found.new_zeros(len(found), self.width), 0
        for first, stop in self.runs:
            whole[:, first:stop] = found[:, start : start + stop - first]
            start += stop - first
        return whole

    def fill(self, own: Any, refit: Refit) -> None:
        """Load weights: fitted ones, or rows of the layer's own projection."""
        if self.reduce is None:
            _copy(self.expand, own.weight[self.kept.to(own.weight.device)], _bias(own, self.kept))
            return
        queries, keys = self.fitted
        _copy(self.reduce, refit["reduce"])
        parts = [(name, keys) for name in ("key", "value")]
        parts = [("query", queries), *parts] if len(queries) else parts
        _copy(
            self.expand,
            torch.cat([refit[name][rows] for name, rows in parts]),
            torch.cat([refit[f"{name}_bias"][rows] for name, rows in parts]),
        )


class VisualOutput(nn.Module):
    """The output projection of the attending heads.

    Args:
        layer: The layer's plan.
        shape: The decoder's dimensions.
        shard: This rank.
        bias: Whether something is added to every visual row.
    """

    def __init__(self, layer: LayerPlan, shape: ModelShape, shard: Shard, *, bias: bool):
        super().__init__()
        self.hidden, self.is_shared = shape.hidden, shard.size > 1 and bool(layer.attend_heads)
        own = shard.heads(shape.heads)
        self.runs = head_runs(layer.attend_heads, own, shape.head_dim)
        self.kept = columns(self.runs)
        self.fitted = _rows_of(layer.attend_heads, own, shape.head_dim)
        self.project = linear(len(self.kept), shape.hidden) if self.runs else None
        self.bias = _bias_parameter(shape.hidden) if bias else None

    def forward(self, mixed: torch.Tensor) -> torch.Tensor:
        """(visual, heads * head_dim) -> (visual, hidden)."""
        if self.project is None:
            out = mixed.new_zeros(len(mixed), self.hidden)
        else:
            parts = [mixed[:, first:stop] for first, stop in self.runs]
            out = self.project(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        return _finish(out, self.bias, is_shared=self.is_shared)

    def fill(self, own: Any, refit: Refit, mean: torch.Tensor | None) -> None:
        """Load weights: fitted ones, or columns of the layer's own projection.

        Args:
            own: The layer's own projection.
            refit: The layer's fitted weights.
            mean: (hidden,) contribution of silent heads; None without ``mean`` compensation.
        """
        if self.project is not None:
            if "output" in refit:
                _copy(self.project, refit["output"][:, self.fitted])
            else:
                _copy(self.project, own.weight[:, self.kept.to(own.weight.device)])
        if self.bias is not None:
            _fill_bias(self.bias, refit.get("output_bias"), mean, own.bias)


class VisualFFN(nn.Module):
    """The neurons that visual tokens use, and the linear map.

    Args:
        layer: The layer's plan.
        shape: The decoder's dimensions.
        shard: This rank.
        biases: Whether the layer's own gate and up projections have a bias, and whether something
            is added to every visual row.
        activation: The layer's own, of gate and up side by side.
    """

    def __init__(
        self,
        layer: LayerPlan,
        shape: ModelShape,
        shard: Shard,
        *,
        biases: tuple[bool, bool],
        activation: Callable[[torch.Tensor], torch.Tensor],
    ):
        super().__init__()
        self.shard, self.hidden, self.neurons = shard, shape.hidden, shard.count(layer.neurons)
        self.is_shared = shard.size > 1 and layer.has_ffn
        self._activation = (activation,)  # not a submodule: it is the layer's
        self.gate_up = self.down = self.map_in = self.map_out = None
        if self.neurons:
            self.gate_up = linear(shape.hidden, 2 * self.neurons, bias=biases[0])
            self.down = linear(self.neurons, shape.hidden)
        rank = shard.count(layer.map_rank)
        if rank:
            self.map_in, self.map_out = linear(shape.hidden, rank), linear(rank, shape.hidden)
        self.bias = _bias_parameter(shape.hidden) if biases[1] else None

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """(visual, hidden) -> (visual, hidden)."""
        out = None
        if self.gate_up is not None and self.down is not None:
            out = self.down(self._activation[0](self.gate_up(normed)))
        if self.map_in is not None and self.map_out is not None:
            mapped = self.map_out(self.map_in(normed))
            out = mapped if out is None else out.add_(mapped)
        if out is None:
            out = normed.new_zeros(len(normed), self.hidden)
        return _finish(out, self.bias, is_shared=self.is_shared)

    def fill(self, own: Any, refit: Refit, mean: torch.Tensor | None) -> None:
        """Load weights; arguments as for :meth:`VisualOutput.fill`, ``own`` being the FFN."""
        if self.gate_up is not None and self.down is not None:
            gate_up, half = own.gate_up_proj, len(own.gate_up_proj.weight) // 2
            kept = torch.cat([torch.arange(self.neurons), half + torch.arange(self.neurons)])
            rows = gate_up.weight[kept.to(gate_up.weight.device)]
            _copy(self.gate_up, rows, _bias(gate_up, kept))
            if "down" in refit:
                _copy(self.down, self._dealt_columns(refit["down"]))
            else:
                _copy(self.down, own.down_proj.weight[:, : self.neurons])
        if self.map_in is not None and self.map_out is not None:
            _copy(self.map_in, refit["map_in"][self.shard.dealt(len(refit["map_in"]))])
            _copy(self.map_out, self._dealt_columns(refit["map_out"]))
        if self.bias is not None:
            _fill_bias(self.bias, refit.get("ffn_bias"), mean, own.down_proj.bias)

    def _dealt_columns(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[:, self.shard.dealt(weight.shape[1])]


def _finish(out: torch.Tensor, bias: torch.Tensor | None, *, is_shared: bool) -> torch.Tensor:
    out = tensor_model_parallel_all_reduce(out) if is_shared else out
    return out if bias is None else out.add_(bias)


def _rows_of(chosen: Sequence[int], own: range, head_dim: int) -> torch.Tensor:
    """Rows of a rank's heads in a fitted weight that holds the chosen heads only."""
    places = [place for place, head in enumerate(chosen) if head in own]
    starts = torch.tensor(places, dtype=torch.int64)[:, None] * head_dim
    return (starts + torch.arange(head_dim)).flatten()


def _bias_parameter(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size), requires_grad=False)


def _copy(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    layer.weight.data.copy_(weight)
    if layer.bias is not None:
        assert bias is not None
        layer.bias.data.copy_(bias)


def _bias(layer: Any, rows: torch.Tensor) -> torch.Tensor | None:
    return None if layer.bias is None else layer.bias[rows.to(layer.bias.device)]


def _fill_bias(
    target: nn.Parameter,
    fitted: torch.Tensor | None,
    mean: torch.Tensor | None,
    own: torch.Tensor | None,
) -> None:
    """What every visual row gets: a fitted bias; or the layer's own, and a mean contribution."""
    if fitted is not None:
        target.data.copy_(fitted)
        return
    target.data.zero_()
    for each in (mean, own):
        if each is not None:
            target.data.add_(each.to(target))
