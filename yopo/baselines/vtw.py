"""Visual token withdrawal: after layer K, visual tokens are gone ("VTW", arXiv 2405.05803).

The paper finds K by the divergence of the outputs on a few samples; here the budget determines it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch

from yopo.baselines.dropping import Dropping
from yopo.baselines.prefill import Between
from yopo.plans.schema import ModelShape, Workload


@dataclass(frozen=True)
class TokenWithdrawal(Dropping):
    """All visual tokens in the first K layers, none after them."""

    name = "vtw"
    label = "VTW"
    source = "arXiv 2405.05803"

    @classmethod
    def choices(cls, shape: ModelShape, workload: Workload) -> Iterable[Self]:
        """Every K."""
        return (cls(layers) for layers in range(shape.layers + 1))

    def kept(self, visual: int) -> int:
        """No tokens."""
        return 0

    def choose(self, between: Between, count: int) -> torch.Tensor:
        """No tokens: (batch, 0) int64."""
        return between.stream.visual[:, :0]

    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """The layer."""
        return f"K = {self.layers} of {shape.layers} layers"
