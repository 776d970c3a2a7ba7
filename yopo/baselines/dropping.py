"""What methods that drop visual tokens in front of one layer have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from yopo.baselines.baseline import Baseline
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape
from yopo.support.errors import PlanError

if TYPE_CHECKING:
    import torch

    from yopo.baselines.prefill import Between


@dataclass(frozen=True)
class Dropping(Baseline):
    """All visual tokens in the first layers, some of them or none after those.

    Attributes:
        layers: Decoder layers in front of the drop (K); all of them: nothing is dropped.
        least_layers: The smallest K that the method can do with.
    """

    layers: int
    least_layers: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.layers < self.least_layers:
            raise PlanError(
                f"{self.name} cannot drop tokens after {self.layers} layers, it needs at least "
                f"{self.least_layers}."
            )

    @abstractmethod
    def kept(self, visual: int) -> int:
        """How many of a prompt's visual tokens go on after the drop."""

    @abstractmethod
    def choose(self, between: Between, count: int) -> torch.Tensor:
        """Which tokens go on: (batch, count) int64, ascending, as ``Baseline.keep`` wants them."""

    def tokens(self, shape: ModelShape, grids: Sequence[Grid]) -> tuple[int, ...]:
        """All of them up to the drop."""
        visual, front = sum(grid.tokens for grid in grids), min(self.layers, shape.layers)
        return (visual,) * front + (self.kept(visual),) * (shape.layers - front)

    def on_layers(self, used: Sequence[int]) -> Self:
        """A drop after as many of the layers as are used."""
        front = sum(index < self.layers for index in used)
        return replace(self, layers=max(front, self.least_layers))

    def keep(self, between: Between) -> torch.Tensor | None:
        """Drop in front of layer K."""
        if between.number != self.layers:
            return None
        return self.choose(between, self.kept(between.num_visual))
