"""DivPrune: the most diverse tokens, by greedy max-min distance (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass

from yopo.reduction.method import Images, Method, Selection, Sides, pairs_flops


@dataclass(frozen=True)
class DivPrune(Method):
    """Tokens far from each other.

    The first is the token whose nearest other one is farthest away; each further one is the token
    farthest from those kept. Distances are 1 - cosine.
    """

    name = "divprune"
    label = "DivPrune"
    source = "arXiv 2503.02175"

    def select(self, images: Images) -> Selection:
        """Greedy max-min."""
        import torch

        from yopo.reduction.arithmetic import ascending, row, similarity

        distance = 1 - similarity(images.features)
        own = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
        nearest = distance.masked_fill(own, float("inf")).amin(dim=2)
        chosen = [nearest.argmax(dim=1)]
        least = row(distance, chosen[0])
        for _ in range(self.count(images.sides) - 1):
            least = least.scatter(1, chosen[-1][:, None], float("-inf"))
            chosen.append(least.argmax(dim=1))
            least = torch.minimum(least, row(distance, chosen[-1]))
        return Selection(ascending(chosen))

    def choosing_flops(self, sides: Sides, width: int, words: int) -> int:
        """All pairs."""
        return pairs_flops(sides, width)
