"""FOLDER: repeated bipartite merging of similar tokens (arXiv 2501.02430, after ToMe).

Each round deals the tokens alternately into two halves; those of the first half that are most
similar to one of the second are merged into it, as a mean weighted by how many tokens each stands
for.
"""

from __future__ import annotations

from dataclasses import dataclass

from yopo.reduction.method import Images, Method, Selection, Sides


@dataclass(frozen=True)
class Folder(Method):
    """Merged tokens, at the place of the one merged into."""

    name = "folder"
    label = "FOLDER"
    source = "arXiv 2501.02430"
    is_regular = True

    @property
    def mixes(self) -> bool:
        """Always."""
        return True

    def select(self, images: Images) -> Selection:
        """Merge until ``count`` tokens remain."""
        import torch

        from yopo.reduction.arithmetic import best, means, precise, unit

        states = precise(images.features)
        many, tokens, width = states.shape
        places = torch.arange(tokens, device=states.device).expand(many, -1)
        joined, sizes = places, torch.ones_like(states[..., 0])
        for _, moved in _rounds(tokens, self.count(images.sides)):
            units = unit(states)
            nearest, to = (units[:, ::2] @ units[:, 1::2].transpose(1, 2)).max(dim=2)
            source = 2 * best(nearest, moved)
            target = 2 * to.gather(1, source // 2) + 1
            leaving = places.gather(1, source)
            parent = torch.arange(tokens, device=states.device).repeat(many, 1)
            parent = parent.scatter(1, leaving, places.gather(1, target))
            joined = parent.gather(1, joined)
            deep = target[..., None].expand(-1, -1, width)
            amount = sizes.gather(1, source)
            brought = states.gather(1, source[..., None].expand(-1, -1, width))
            total = states * sizes[..., None]
            total = total.scatter_add(1, deep, brought * amount[..., None])
            sizes = sizes.scatter_add(1, target, amount)
            stays = torch.ones_like(sizes, dtype=torch.bool).scatter(1, source, False)
            index = stays.nonzero()[:, 1].reshape(many, -1)
            states = (total / sizes[..., None]).gather(1, index[..., None].expand(-1, -1, width))
            places, sizes = places.gather(1, index), sizes.gather(1, index)
        return means(places, torch.searchsorted(places, joined))

    def choosing_flops(self, sides: Sides, width: int, words: int) -> int:
        """The pairs of all rounds."""
        rounds = _rounds(sides[0] * sides[1], self.count(sides))
        return sum(2 * -(-left // 2) * (left // 2) * width for left, _ in rounds)


def _rounds(tokens: int, count: int) -> list[tuple[int, int]]:
    """(tokens before the round, tokens that leave) of every round."""
    rounds = []
    while tokens > count:
        moved = min(tokens // 2, tokens - count)
        rounds.append((tokens, moved))
        tokens -= moved
    return rounds
