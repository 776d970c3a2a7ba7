"""A plan as masks over the full computation: how the paper's released code demonstrates its method.

Every projection, every head and every FFN neuron runs for every token, and the KV cache is full;
what the plan prunes is then masked out. Semantics and outputs are those of ``runtime/reference.py``
(keys are excluded before the softmax, where the released code zeroes them after it); the cost is
the simulation's. Unlike the released code, it can use SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from yopo.baselines.baseline import Baseline, Hooks
from yopo.baselines.prefill import Decoder, Prompt
from yopo.models.family import Backbone
from yopo.models.streams import TokenLayout
from yopo.plans.checks import check_tensors
from yopo.plans.schema import ModelShape, PruningPlan, Workload
from yopo.runtime.reference import LayerSpec
from yopo.support.errors import PlanError


@dataclass(frozen=True)
class MaskedPlan(Baseline):
    """Produces a given plan's outputs at the dense model's cost."""

    name = "masked"
    label = "masks"
    source = "arXiv 2410.06169"
    needs_plan = True
    drops_tokens = False

    @classmethod
    def choices(cls, shape: ModelShape, workload: Workload) -> Iterable[Self]:
        """The only choice."""
        return (cls(),)

    @classmethod
    def solve(cls, shape: ModelShape, workload: Workload, budget: float) -> Self:
        """The same for every budget, as the plan decides what is pruned."""
        return cls()

    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """A note that nothing is saved."""
        return "the plan as masks, nothing is skipped"

    def hooks(self, decoder: Decoder, names: Backbone, plan: PruningPlan | None) -> Hooks:
        """Hooks on the projections, and attention masks.

        Raises:
            PlanError: There is no plan, it lacks tensors, or it has fitted weights, which masks
                cannot represent.
        """
        if plan is None:
            raise PlanError(f"The baseline '{self.name}' needs a plan.", remedy="Pass one.")
        check_tensors(plan)
        return Masks(plan, decoder, names)


class Masks(Hooks):
    """Hooks that mask out what a plan prunes, and the attention masks of its layers.

    Args:
        plan: The plan.
        decoder: The decoder whose projections are hooked, until ``remove``.
        names: Names of the decoder's modules.

    Raises:
        PlanError: The plan has fitted weights, which masks cannot represent.
    """

    def __init__(self, plan: PruningPlan, decoder: Decoder, names: Backbone):
        if plan.reduction is not None:
            raise PlanError("Masks can only simulate pruning, but the plan reduces visual tokens.")
        if plan.compensation == "refit":
            raise PlanError("Masks can only simulate pruning, but the plan has fitted weights.")
        self.plan = plan
        self._is_visual: torch.Tensor | None = None
        self._handles: list[RemovableHandle] = []
        layer: Any
        for number, layer in enumerate(decoder.layers):
            spec = LayerSpec(plan, number, None, None)
            output, down = getattr(layer.self_attn, names.output), getattr(layer.mlp, names.down)
            self._watch(output, spec.head_mean, _pruned_heads(spec), bool(spec.layer.attend_heads))
            self._watch(down, spec.neuron_mean, _pruned_neurons(spec), spec.layer.neurons > 0)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def enter(self, visual: torch.Tensor, length: int) -> None:
        """Store the positions of this forward's visual tokens: (batch, visual) int64."""
        table = torch.zeros(len(visual), length, dtype=torch.bool, device=visual.device)
        self._is_visual = table.scatter_(1, visual, True)

    def leave(self) -> None:
        """Forget the positions."""
        self._is_visual = None

    def attention_mask(
        self,
        layer: int,
        mask: torch.Tensor | None,
        *,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        visual: torch.Tensor | None,
        prompt: Prompt | None,
    ) -> torch.Tensor | None:
        """The plan's mask in prefill; later without visual keys in heads that do not read them."""
        if prompt is not None:
            return self._prefill_mask(layer, prompt.layout, prompt.real, hidden)
        return mask if visual is None else self._later_mask(layer, visual, keys, mask)

    def _prefill_mask(
        self, number: int, layout: TokenLayout, real: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        """(batch, heads, length, length) bool of one layer; an empty row attends to itself."""
        with hidden.device:
            allowed = LayerSpec(self.plan, number, layout, real).allowed(hidden)
            own = torch.eye(hidden.shape[1], dtype=torch.bool)
        return allowed | (own & ~allowed.any(dim=-1, keepdim=True))

    def _later_mask(
        self, number: int, visual: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The mask of text after the prompt in one layer.

        Args:
            number: The layer.
            visual: (batch, visual) int64, logical positions of visual keys.
            keys: (batch, keys) int64, logical positions of all keys.
            mask: (batch, 1, queries, keys) bool, or None: everything.

        Returns:
            (batch, heads, queries or 1, keys) bool, or ``mask`` where all heads are kept.
        """
        shape, heads = self.plan.model.shape, self.plan.layers[number].read_heads
        if len(heads) == shape.heads:
            return mask
        is_visual = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, visual, True)
        kept = torch.zeros(shape.heads, dtype=torch.bool, device=keys.device)
        kept[list(heads)] = True
        readable = kept[None, :, None, None] | ~is_visual[:, None, None, :]
        return readable if mask is None else readable & mask

    def _watch(
        self, module: nn.Linear, mean: torch.Tensor | None, is_pruned: torch.Tensor, is_on: bool
    ) -> None:
        """Replace pruned inputs of visual tokens by means (or 0), and outputs if all are pruned."""
        device = module.weight.device
        instead = torch.zeros((), device=device) if mean is None else mean.flatten().to(device)
        is_pruned = is_pruned.to(device)
        self._handles.append(module.register_forward_pre_hook(self._inputs(is_pruned, instead)))
        if not is_on and mean is None:
            self._handles.append(module.register_forward_hook(self._outputs()))

    def _inputs(self, is_pruned: torch.Tensor, instead: torch.Tensor) -> Callable:
        def replace(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            if self._is_visual is None:
                return None
            (values,) = args
            chosen = self._is_visual[..., None] & is_pruned
            return (torch.where(chosen, instead.to(values), values),)

        return replace

    def _outputs(self) -> Callable:
        def silence(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if self._is_visual is None:
                return None
            return output.masked_fill(self._is_visual[..., None], 0.0)

        return silence


def _pruned_heads(spec: LayerSpec) -> torch.Tensor:
    """(heads * head_dim,) bool: attention outputs that are pruned for visual tokens."""
    is_silent = torch.ones(spec.shape.heads, dtype=torch.bool)
    is_silent[list(spec.layer.attend_heads)] = False
    return is_silent.repeat_interleave(spec.shape.head_dim)


def _pruned_neurons(spec: LayerSpec) -> torch.Tensor:
    """(ffn,) bool: neurons that visual tokens do not use."""
    is_pruned = torch.zeros(spec.shape.ffn, dtype=torch.bool)
    is_pruned[spec.order[spec.layer.neurons :]] = True
    return is_pruned
