"""Random visual tokens: what a choice of tokens has to beat.

A draw depends only on a seed and the prompt's size, so the same prompt always keeps the same
tokens, whatever else is in its batch and whether it is padded or followed by an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self
from zlib import crc32

import torch

from yopo.baselines.baseline import share_of
from yopo.baselines.dropping import Dropping
from yopo.baselines.prefill import Between, Prompt
from yopo.baselines.reduction import Reduction
from yopo.plans.schema import ModelShape, Workload


@dataclass(frozen=True)
class RandomTokens(Dropping):
    """A share of the visual tokens, drawn at random, after the first K layers or in all of them.

    Attributes:
        share: Share of the visual tokens kept after the drop.
        seed: Seed of the draw, along with the prompt's numbers of visual and of all tokens.
    """

    share: float = 0.0
    seed: int = 0

    name = "random"
    label = "random tokens"
    source = ""

    @classmethod
    def choices(cls, shape: ModelShape, workload: Workload) -> Iterable[Self]:
        """Every number of tokens, dropped before the first layer."""
        visual = max(workload.visual, 1)
        return (cls(0, count / visual) for count in range(visual + 1))

    def kept(self, visual: int) -> int:
        """A share of the tokens."""
        return share_of(self.share, visual)

    def reduce(
        self, prompt: Prompt, embeds: torch.Tensor, positions: torch.Tensor
    ) -> Reduction | None:
        """K = 0: drop before the first layer; kept tokens keep their features and positions."""
        if self.layers:
            return None
        visual = prompt.layout.visual.length
        return Reduction(self._drawn(prompt, visual, self.kept(visual)))

    def keep(self, between: Between) -> torch.Tensor | None:
        """K > 0: drop before layer K."""
        return super().keep(between) if self.layers else None

    def choose(self, between: Between, count: int) -> torch.Tensor:
        """Random tokens: (batch, count) int64, ascending."""
        return self._drawn(between.prompt, between.num_visual, count)

    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """The share, and the layer if it is not the first."""
        share = f"R = {100 * self.share:.1f} %"
        return f"K = {self.layers} of {shape.layers} layers, {share}" if self.layers else share

    def _drawn(self, prompt: Prompt, visual: int, count: int) -> torch.Tensor:
        """(batch, count) int64, ascending: random indices below ``visual``."""
        rows = []
        for length in prompt.lengths.tolist():
            # A checksum spreads the three over the 32 bits that torch's CPU generator uses.
            seed = crc32(f"{self.seed} {visual} {length}".encode())
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(visual, generator=generator)
            rows.append(order[:count].sort().values)
        return torch.stack(rows).to(prompt.ends.device)
