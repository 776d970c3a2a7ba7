"""PruMerge and PruMerge+: salient tokens that take in their neighbors (arXiv 2403.15388).

The paper finds the number of tokens by an outlier test, per image; here ``keep`` sets it, because a
static plan's cost must not depend on the image. It takes nearness from the tower's keys; here it is
that of the projected tokens, which every family has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from yopo.reduction.method import Images, Method, Selection, Sides, pairs_flops


@dataclass(frozen=True)
class PruMerge(Method):
    """The tokens with the most attention; each adds an attention-weighted sum of dropped ones.

    Attributes:
        neighbors: How many of the dropped tokens, the nearest, each kept token adds.
        merge: Whether it adds any.
        spatial: The share of kept tokens that is spread evenly over the image instead.
    """

    neighbors: int = 32
    merge: bool = True

    name = "prumerge"
    label = "PruMerge"
    source = "arXiv 2403.15388"
    needs_attention = True
    spatial: ClassVar[float] = 0.0

    @property
    def mixes(self) -> bool:
        """Whether tokens are merged."""
        return self.merge

    def select(self, images: Images) -> Selection:
        """The most attended tokens, and evenly spread ones among the rest."""
        import torch

        from yopo.reduction.arithmetic import best, similarity

        assert images.attention is not None, "the stage provides it"
        attention, count = images.attention, self.count(images.sides)
        tokens, even = attention.shape[1], int(count * self.spatial)
        kept = best(attention, count - even)
        if even:
            taken = torch.zeros_like(attention, dtype=torch.bool).scatter(1, kept, True)
            rest = (~taken).nonzero()[:, 1].reshape(len(attention), -1)
            steps = (torch.arange(even) * rest.shape[1] + rest.shape[1] // 2) // even
            kept = torch.cat([kept, rest[:, steps.to(rest.device)]], dim=1).sort(dim=1).values
        if not self.merge:
            return Selection(kept)
        own = torch.nn.functional.one_hot(kept, tokens)
        cosines = similarity(images.features)
        dropped = own.sum(dim=1) == 0
        near = cosines.gather(1, kept[..., None].expand(-1, -1, tokens))
        near = near.masked_fill(~dropped[:, None], float("-inf"))
        members = near.topk(min(self.neighbors, tokens - count), dim=2).indices
        added = torch.zeros_like(near).scatter(2, members, 1.0) * attention.to(near)[:, None]
        return Selection(kept, (own + added).float())

    def choosing_flops(self, sides: Sides, width: int, words: int) -> int:
        """All pairs, to find who merges."""
        return pairs_flops(sides, width) if self.merge else 0

    def problem(self) -> tuple[str, str] | None:
        """As in the base class, and no neighbors."""
        if self.neighbors < 1:
            return "neighbors", f"must be at least 1, found {self.neighbors}"
        return super().problem()


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with half of the tokens spread evenly over the image."""

    name = "prumerge+"
    label = "PruMerge+"
    spatial: ClassVar[float] = 0.5
