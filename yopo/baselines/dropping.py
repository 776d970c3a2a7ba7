"""The common base of methods that drop visual tokens before one layer."""

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
    """All visual tokens in the first layers, some or none of them after those.

    Attributes:
        layers: Decoder layers before the drop (K); all of them: nothing is dropped.
        least_layers: The smallest K that the method supports.
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
        """How many of a prompt's visual tokens are kept by the drop."""

    @abstractmethod
    def choose(self, between: Between, count: int) -> torch.Tensor:
        """The kept tokens: (batch, count) int64, ascending, as returned by ``Baseline.keep``."""

    def tokens(self, shape: ModelShape, grids: Sequence[Grid]) -> tuple[int, ...]:
        """All tokens up to the drop, the kept ones after it."""
        visual, before = sum(grid.tokens for grid in grids), min(self.layers, shape.layers)
        return (visual,) * before + (self.kept(visual),) * (shape.layers - before)

    def on_layers(self, used: Sequence[int]) -> Self:
        """A drop after those of the first K layers that are used."""
        before = sum(index < self.layers for index in used)
        return replace(self, layers=max(before, self.least_layers))

    def keep(self, between: Between) -> torch.Tensor | None:
        """Drop before layer K."""
        if between.number != self.layers:
            return None
        return self.choose(between, self.kept(between.num_visual))
