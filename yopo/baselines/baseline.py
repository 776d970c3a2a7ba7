"""What a baseline is: one class with everything that its method decides.

A subclass is a frozen dataclass whose fields are the method's parameters; an instance is the
method, ready to run on any prompt. What it costs follows from the visual tokens that it leaves in
every layer, each of which does everything there. No torch here: hooks are typed, not run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from yopo.plans.flops import dense_prefill_flops, dense_visual_flops, dense_visual_kv_bytes
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, PruningPlan, Workload
from yopo.support.errors import PlanError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from yopo.baselines.prefill import Between, Decoder, Prompt
    from yopo.baselines.reduction import Reduction
    from yopo.models.family import Backbone, Family

_ROUNDING = 1e-6


class Hooks:
    """What a method keeps on a model while it runs there; this one keeps nothing.

    Made by :meth:`Baseline.hooks` when a method is installed.
    """

    def enter(self, visual: torch.Tensor, length: int) -> None:
        """A forward of prompts begins.

        Args:
            visual: (batch, visual) int64, positions of its visual tokens.
            length: Tokens per row.
        """

    def leave(self) -> None:
        """The forward, of whatever kind, is over."""

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
        """Who may attend whom in one layer.

        Args:
            layer: Its index.
            mask: (batch, 1, queries, keys) bool, causal and without padding; None: stock attention
                is right without one.
            hidden: (batch, queries, hidden), the layer's input.
            keys: (batch, keys) int64, logical positions of all keys.
            visual: (batch, visual) int64, logical positions of the visual ones as they came in;
                None: there were none.
            prompt: The prompts, in the forward that prefills images; None in all others.

        Returns:
            (batch, 1 or heads, queries, keys) bool, or None as above.
        """
        return mask

    def remove(self) -> None:
        """Take off the model what was put there."""


@dataclass(frozen=True)
class Baseline(ABC):
    """A method and its parameters.

    Attributes:
        name: What command lines and results call it; its key in the registry.
        label: What tables call it.
        source: The paper that describes it, or an empty string.
        needs_plan: Whether it shows a given plan instead of meeting a budget of its own. What it
            takes is then the dense model's cost, so it is left out where only cost counts.
        drops_tokens: Whether visual tokens may leave before the last layer.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    source: ClassVar[str]
    needs_plan: ClassVar[bool] = False
    drops_tokens: ClassVar[bool] = True

    # What it does at a budget, in closed form.

    @classmethod
    @abstractmethod
    def choices(cls, shape: ModelShape, workload: Workload) -> Iterable[Self]:
        """The parameters to choose from when a budget is to be met; ties go to earlier ones."""

    @classmethod
    def solve(cls, shape: ModelShape, workload: Workload, budget: float) -> Self:
        """The choice that comes closest to a visual budget in (0, 1] from below.

        Raises:
            PlanError: The least of them is above the budget.
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
        """FLOPs of one prefill that no layer's tokens account for, such as ranking them."""
        return 0

    def on_layers(self, used: Sequence[int]) -> Self:
        """The same on a model that has only some of the layers, by their indices."""
        return self

    @abstractmethod
    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """The parameters, as papers write them."""

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, as plain values."""
        return {"name": self.name, **asdict(self)}

    # What it does on a model.

    def check_model(self, model: PreTrainedModel, family: Family) -> None:
        """Refuse a model on which the method makes no sense.

        Raises:
            ModelError: It is one.
        """
        return None

    def hooks(self, decoder: Decoder, names: Backbone, plan: PruningPlan | None) -> Hooks:
        """Put on a decoder what the method needs there.

        Args:
            decoder: Stock layers.
            names: Of their modules.
            plan: What was given; of the model's shape.

        Raises:
            PlanError: The method ``needs_plan``, and there is none or it cannot be shown.
        """
        return Hooks()

    def reduce(
        self, prompt: Prompt, embeds: torch.Tensor, positions: torch.Tensor
    ) -> Reduction | None:
        """Drop or merge visual tokens in front of the first layer.

        Args:
            prompt: Where text and images are.
            embeds: (batch, sequence, hidden), image features merged in.
            positions: (axes, batch, sequence) int64; axes 1, or 3 (time, row, column) under M-RoPE.

        Returns:
            What becomes of the visual tokens; None: all go in.

        Raises:
            ModelError: The prompts are of a kind that the method does not know.
        """
        return None

    def keep(self, between: Between) -> torch.Tensor | None:
        """Drop visual tokens between two layers of a prefill; asked in front of every layer.

        Args:
            between: The layers, and the tokens on their way.

        Returns:
            (batch, kept) int64, ascending: which of the stream's visual tokens go on, 0 the first
            of them; equally many per row. None: all of them.
        """
        return None

    # What that costs.

    def visual_flops(self, shape: ModelShape, workload: Workload) -> int:
        """Visual FLOPs that the method computes for one prompt, in the paper's convention.

        What only ranks tokens is not counted, as the papers do not.
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
        """A dense layer for every one, and the prompt that it sees."""
        one = replace(shape, layers=1)
        counts = self.tokens(shape, workload.grids)
        return [(one, _with_visual(workload, count)) for count in counts]


def share_of(share: float, count: int) -> int:
    """A share of a count, rounded down; a share that was a quotient of counts gives them back."""
    return int(share * count + _ROUNDING)


def _with_visual(workload: Workload, visual: int) -> Workload:
    """The prompt with this many visual tokens."""
    grids = (Grid(1, visual),) if visual else ()
    return Workload(grids, workload.text, workload.text_before)
