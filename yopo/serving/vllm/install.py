"""Puts the visual parts into vLLM's own decoder layers, whichever backbone they are of.

A layer's ``qkv_proj``, ``o_proj`` and ``mlp`` get a subclass of their own class, whose forward
sends text rows through the stock one and visual rows through the part in ``visual``. Norms, rotary
positions, attention and the KV cache see whole batches, as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from yopo.plans.layer_plan import LayerPlan
from yopo.plans.schema import PruningPlan
from yopo.plans.tensors import Refit
from yopo.serving.vllm.parts import VisualFFN, VisualOutput, VisualQKV
from yopo.serving.vllm.rows import BatchRows, put, take
from yopo.serving.vllm.shard import Shard
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase as _Stock
else:
    _Stock = nn.Module  # mixed into a class of vLLM's, which provides the rest


VisualPart = VisualQKV | VisualOutput | VisualFFN


class SplitModule(_Stock):
    """A module through which only text rows go; mixed into its class by :func:`_split`."""

    visual: VisualPart
    rows: BatchRows

    def forward(self, inputs: torch.Tensor) -> Any:
        """Map (tokens, features); returns what the stock module returns."""
        split = self.rows.split
        if split is None:
            return super().forward(inputs)
        visual = self.visual(take(inputs, split.visual))
        outputs = visual.new_empty(len(inputs), visual.shape[1])
        put(outputs, split.visual, visual)
        text = take(inputs, split.text)
        if len(text):
            found = super().forward(text)
            put(outputs, split.text, found[0] if isinstance(found, tuple) else found)
        return (outputs, None) if getattr(self, "return_bias", False) else outputs


_CLASSES: dict[str, type] = {}


def _split(module: Any, part: nn.Module, rows: BatchRows) -> None:
    stock = type(module)
    name = f"{stock.__module__}.{stock.__qualname__}"
    if name not in _CLASSES:
        _CLASSES[name] = type(f"Split{stock.__name__}", (SplitModule, stock), {})
    module.__class__ = _CLASSES[name]
    module.rows, module.visual = rows, part


class Installed:
    """The visual parts of a model's layers.

    Args:
        layers: vLLM's decoder layers.
        plan: A plan that an engine can run; its tensors come later, with the weights.
        rows: Which rows of a batch are visual.
    """

    def __init__(self, layers: nn.ModuleList, plan: PruningPlan, rows: BatchRows):
        self.plan, self.layers = plan, layers
        self.shard = Shard(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        shape = plan.model.shape
        if len(layers) != shape.layers:
            raise ModelError(
                f"The decoder has {len(layers)} layers, but the plan was made for {shape.layers}.",
                remedy="Serve the checkpoint with all of its layers.",
            )
        for layer, each in zip(layers, plan.layers, strict=True):
            for module, part in self._parts(layer, each):
                _split(module, part, rows)

    def _parts(self, layer: Any, plan: LayerPlan) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The modules of a layer that visual rows do not go through, and what they go through."""
        shape, shard, has_mean = self.plan.model.shape, self.shard, self.has_mean
        attention, ffn = layer.self_attn, layer.mlp
        attends_all = len(plan.attend_heads) == shape.heads
        if plan.qkv_rank is not None or not attends_all:
            bias = attention.qkv_proj.bias is not None
            yield attention.qkv_proj, VisualQKV(plan, shape, shard, bias=bias)
        if not attends_all:
            own = bool(plan.attend_heads) and attention.o_proj.bias is not None
            bias = own or has_mean or (self.is_fitted and bool(plan.attend_heads))
            yield attention.o_proj, VisualOutput(plan, shape, shard, bias=bias)
        if plan.neurons < shape.ffn:
            own = plan.neurons > 0 and ffn.down_proj.bias is not None
            bias = own or has_mean or (self.is_fitted and plan.has_ffn)
            biases = ffn.gate_up_proj.bias is not None, bias
            yield ffn, VisualFFN(plan, shape, shard, biases=biases, activation=ffn.act_fn)

    @property
    def has_mean(self) -> bool:
        """Whether visual rows get the mean contribution of what they skip."""
        return self.plan.compensation == "mean"

    @property
    def is_fitted(self) -> bool:
        """Whether visual rows have fitted weights."""
        return self.plan.compensation == "refit"

    def fill(self, plan: PruningPlan) -> None:
        """Load the parts' weights, after the layers' own.

        Args:
            plan: The same plan with its tensors.
        """
        for index, layer in enumerate(self.layers):
            refit = plan.tensors.refit.get(index, {}) if self.is_fitted else {}
            self._fill(layer, refit, self._silent_heads(plan, index), self._unused(plan, index))

    def _fill(
        self, layer: Any, refit: Refit, silent: torch.Tensor | None, unused: torch.Tensor | None
    ) -> None:
        attention, ffn = layer.self_attn, layer.mlp
        part = getattr(attention.qkv_proj, "visual", None)
        if isinstance(part, VisualQKV):
            part.fill(attention.qkv_proj, refit)
        part = getattr(attention.o_proj, "visual", None)
        if isinstance(part, VisualOutput):
            part.fill(attention.o_proj, refit, self._through(attention.o_proj, silent))
        part = getattr(ffn, "visual", None)
        if isinstance(part, VisualFFN):
            part.fill(ffn, refit, self._through(ffn.down_proj, unused))

    def _silent_heads(self, plan: PruningPlan, index: int) -> torch.Tensor | None:
        """Means of this rank's heads, 0 in attending ones; None without ``mean`` compensation."""
        means = plan.tensors.head_mean
        if means is None or not self.has_mean:
            return None
        silent = means[index].clone()
        silent[list(plan.layers[index].attend_heads)] = 0
        own = self.shard.heads(plan.model.shape.heads)
        return silent[own.start : own.stop].flatten()

    def _unused(self, plan: PruningPlan, index: int) -> torch.Tensor | None:
        """Means of this rank's neurons, 0 in used ones; None without ``mean`` compensation."""
        means = plan.tensors.neuron_mean
        if means is None or not self.has_mean:
            return None
        unused = means[index].clone()
        unused[: plan.layers[index].neurons] = 0
        return unused[self.shard.dealt(len(unused))]

    def _through(self, projection: Any, mean: torch.Tensor | None) -> torch.Tensor | None:
        """Project a mean by a layer's own weight, on all ranks together."""
        if mean is None:
            return None
        found = torch.mv(projection.weight, mean.to(projection.weight))
        return tensor_model_parallel_all_reduce(found) if self.shard.size > 1 else found

    def names(self, model: nn.Module) -> set[str]:
        """The parts' parameters by their names in a model."""
        parts = {id(each) for each in self._visual_parameters()}
        return {name for name, each in model.named_parameters() if id(each) in parts}

    def _visual_parameters(self) -> Iterator[nn.Parameter]:
        for module in self.layers.modules():
            if isinstance(module, SplitModule):
                yield from module.visual.parameters()
