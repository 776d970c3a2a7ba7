"""SCOPE: tokens that cover the others and that the tower attends to (arXiv 2510.24214)."""

from __future__ import annotations

from dataclasses import dataclass

from yopo.reduction.method import Images, Method, Selection, Sides, pairs_flops


@dataclass(frozen=True)
class Scope(Method):
    """Greedy coverage, weighted by saliency.

    Every step takes the token i of the largest ``sum_u max(0, S_ui - cover_u) a_i^alpha``, where
    ``cover_u`` is the largest cosine of u to a kept token (at least 0) and a the attention in the
    vision tower.

    Attributes:
        alpha: The exponent; 0: coverage alone.
    """

    alpha: float = 1.0

    name = "scope"
    label = "SCOPE"
    source = "arXiv 2510.24214"
    needs_attention = True

    def select(self, images: Images) -> Selection:
        """Greedy coverage."""
        import torch

        from yopo.reduction.arithmetic import ascending, row, similarity

        assert images.attention is not None, "the stage provides it"
        cosines = similarity(images.features)
        weight = images.attention.to(cosines).pow(self.alpha)
        cover = cosines.new_zeros(cosines.shape[:2])
        taken = torch.zeros_like(cover, dtype=torch.bool)
        chosen: list[torch.Tensor] = []
        for _ in range(self.count(images.sides)):
            gain = (cosines - cover[:, :, None]).clamp(min=0).sum(dim=1) * weight
            chosen.append(gain.masked_fill(taken, float("-inf")).argmax(dim=1))
            taken = taken.scatter(1, chosen[-1][:, None], True)
            cover = torch.maximum(cover, row(cosines, chosen[-1]))
        return Selection(ascending(chosen))

    def choosing_flops(self, sides: Sides, width: int, words: int) -> int:
        """All pairs; the coverage itself is no matrix product."""
        return pairs_flops(sides, width)

    def problem(self) -> tuple[str, str] | None:
        """As in the base class, and a negative exponent."""
        if not self.alpha >= 0:
            return "alpha", f"must be at least 0, found {self.alpha}"
        return super().problem()
