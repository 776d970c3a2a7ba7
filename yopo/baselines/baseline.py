"""The interface of a baseline: one class with everything specific to its method.

A subclass is a frozen dataclass whose fields are the method's parameters; an instance is the
method, ready to run on any prompt. Its cost follows from the number of visual tokens that it leaves
in every layer, each computed in full there. No torch at run time: hooks are typed, not run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from yopo.plans.flops import dense_prefill_flops, dense_visual_flops, dense_visual_kv_bytes
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, PruningPlan, Workload
from yopo.support.errors import PlanError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from yopo.baselines.prefill import Between, Decoder, Prompt
    from yopo.baselines.reduction import Reduction
    from yopo.models.family import Backbone, Family

_ROUNDING = 1e-6


class Hooks:
    """A method's state and hooks on a model while it is installed; by default there are none.

    Made by :meth:`Baseline.hooks` when a method is installed.
    """

    def enter(self, visual: torch.Tensor, length: int) -> None:
        """Called when a forward of prompts begins.

        Args:
            visual: (batch, visual) int64, positions of its visual tokens.
            length: Tokens per row.
        """

    def leave(self) -> None:
        """Called when a forward of any kind ends."""

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
        """The attention mask of one layer.

        Args:
            layer: Its index.
            mask: (batch, 1, queries, keys) bool, causal and without padding; None: stock attention
                needs none.
            hidden: (batch, queries, hidden), the layer's input.
            keys: (batch, keys) int64, logical positions of all keys.
            visual: (batch, visual) int64, logical positions of the visual tokens in the prompt;
                None: there were none.
            prompt: The prompts, in the forward that prefills images; None in all others.

        Returns:
            (batch, 1 or heads, queries, keys) bool, or None as above.
        """
        return mask

    def remove(self) -> None:
        """Remove everything that was added to the model."""


@dataclass(frozen=True)
class Baseline(ABC):
    """A method and its parameters.

    Attributes:
        name: Its key in the registry, on command lines and in results.
        label: Its name in tables.
        source: The paper that describes it, or an empty string.
        needs_plan: Whether it demonstrates a given plan instead of meeting a budget. It then costs
            as much as the dense model, so it is left out where only cost matters.
        drops_tokens: Whether visual tokens may leave before the last layer.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    source: ClassVar[str]
    needs_plan: ClassVar[bool] = False
    drops_tokens: ClassVar[bool] = True

    # Parameters and cost at a budget, in closed form.

    @classmethod
    @abstractmethod
    def choices(cls, shape: ModelShape, workload: Workload) -> Iterable[Self]:
        """The candidate parameters for meeting a budget; ties go to earlier ones."""

    @classmethod
    def solve(cls, shape: ModelShape, workload: Workload, budget: float) -> Self:
        """The choice that comes closest to a visual budget in (0, 1] from below.

        Raises:
            PlanError: The cheapest choice is above the budget.
        """
        reached = [(each.reached(shape, workload), each) for each in cls.choices(shape, workload)]
        fitting = [pair for pair in reached if pair[0] <= budget * (1 + _ROUNDING)]
        if not fitting:
            least = min(share for share, _ in reached)
            raise PlanError(
                f"{cls.name} needs at least {100 * least:.1f} % of the visual FLOPs on "
                f"{shape.layers} layers, above the budget of {100 * budget:.1f} %.",
                remedy="Compare at a larger budget, or leave this baseline out.",
            )
        return max(fitting, key=lambda pair: pair[0])[1]

    def tokens(self, shape: ModelShape, grids: Sequence[Grid]) -> tuple[int, ...]:
        """Visual tokens of one prompt in every layer."""
        return (sum(grid.tokens for grid in grids),) * shape.layers

    def extra_flops(self, shape: ModelShape, workload: Workload) -> int:
        """FLOPs of one prefill in addition to those of its layers, such as ranking tokens."""
        return 0

    def on_layers(self, used: Sequence[int]) -> Self:
        """The equivalent method on a model with only some of the layers, given by index."""
        return self

    @abstractmethod
    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """The parameters, in the notation of the papers."""

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters as plain values."""
        return {"name": self.name, **asdict(self)}

    # Execution on a model.

    def check_model(self, model: PreTrainedModel, family: Family) -> None:
        """Check that the method applies to a model.

        Raises:
            ModelError: It does not.
        """
        return None

    def tower_attention(self, family: Family, config: PreTrainedConfig) -> str | None:
        """The vision tower's attention module to record; None: the method does not need it.

        Raises:
            ModelError: It does, and the tower has none that can be recorded.
        """
        return None

    def hooks(self, decoder: Decoder, names: Backbone, plan: PruningPlan | None) -> Hooks:
        """Install the method's hooks on a decoder.

        Args:
            decoder: Decoder with stock layers.
            names: Names of the layers' modules.
            plan: The caller's plan, for a model of this shape, or None.

        Raises:
            PlanError: The method ``needs_plan``, and there is none or it cannot be demonstrated.
        """
        return Hooks()

    def reduce(
        self, prompt: Prompt, embeds: torch.Tensor, positions: torch.Tensor
    ) -> Reduction | None:
        """Drop or merge visual tokens before the first layer.

        Args:
            prompt: Where text and images are.
            embeds: (batch, sequence, hidden), image features merged in.
            positions: (axes, batch, sequence) int64; axes 1, or 3 (time, row, column) under M-RoPE.

        Returns:
            How the visual tokens are reduced; None: all are kept.

        Raises:
            ModelError: The method does not support this kind of prompt.
        """
        return None

    def keep(self, between: Between) -> torch.Tensor | None:
        """Drop visual tokens between two layers of a prefill; called before every layer.

        Args:
            between: The two layers and the tokens between them.

        Returns:
            (batch, kept) int64, ascending: indices of the kept tokens among the stream's visual
            ones, the same number per row. None: all of them.
        """
        return None

    # Cost of the execution.

    def visual_flops(self, shape: ModelShape, workload: Workload) -> int:
        """Visual FLOPs that the method computes for one prompt, in the paper's convention.

        As in the papers, ranking tokens is not counted.
        """
        return sum(dense_visual_flops(*each) for each in self._layers(shape, workload))

    def reached(self, shape: ModelShape, workload: Workload) -> float:
        """The method's visual FLOPs over the dense model's."""
        return self.visual_flops(shape, workload) / dense_visual_flops(shape, workload)

    def prefill_flops(self, shape: ModelShape, workload: Workload) -> int:
        """Matrix-product FLOPs that the method executes to prefill one prompt, text included."""
        layers = sum(dense_prefill_flops(*each) for each in self._layers(shape, workload))
        return layers + self.extra_flops(shape, workload)

    def visual_kv_bytes(self, shape: ModelShape, workload: Workload, itemsize: int = 2) -> int:
        """Bytes of visual keys and values in the method's cache for one prompt."""
        layers = self._layers(shape, workload)
        return sum(dense_visual_kv_bytes(*each, itemsize) for each in layers)

    def _layers(self, shape: ModelShape, workload: Workload) -> list[tuple[ModelShape, Workload]]:
        """Dense layers, together where they see the same prompt, with that prompt."""
        counts = Counter(self.tokens(shape, workload.grids))
        return [
            (replace(shape, layers=layers), _with_visual(workload, count))
            for count, layers in counts.items()
        ]


def share_of(share: float, count: int) -> int:
    """A share of a count, rounded down; exact for a share that is a quotient of counts."""
    return int(share * count + _ROUNDING)


def _with_visual(workload: Workload, visual: int) -> Workload:
    """The prompt with this many visual tokens."""
    grids = (Grid(1, visual),) if visual else ()
    return Workload(grids, workload.text, workload.text_before)
