"""PAR: prompt-aware token reduction, re-implemented from its description (arXiv 2410.07278).

No code of it exists, and no readable copy of its method section. What its abstract and reviews say
is implemented: no training and no attention scores; a graph of similar tokens and its clusters;
retrieval of the clusters that match the words of the prompt (external redundancy); a router that
keeps the distinctive tokens among those (internal redundancy). How is interpretation; each step has
an argument that switches it off:

1. Words (``words``): template and stop words, which are the tokens found in most questions of the
   calibration (``common``), weigh a tenth of the others.
2. Embeddings: tokens against the language model's input embeddings of the words; tokens are centred
   by their image's mean.
3. Graph (``graph``): an edge where the cosine is above a quantile of the image's cosines and one
   token is among the nearest of the other. Clusters are its connected components; those of more
   tokens than are kept are cut again at higher thresholds.
4. Retrieval (``prompt``): a token's relevance is ``sum_q w_q max(0, Q_q . V_i)``. Clusters come
   in the order of their three most relevant tokens' mean until they hold three times the tokens
   that are kept, and the most central token of each other large cluster is a candidate as well.
5. Routing (``router``): greedily the token of the largest ``r_i^0.5 (1 - max_kept S_ij)``; without
   it, the most relevant tokens. A dropped token is averaged into the nearest kept one if their
   cosine is above the threshold (``merge``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from yopo.reduction.method import Images, Method, Selection, Sides, pairs_flops

if TYPE_CHECKING:
    import torch

_COMMON_WEIGHT = 0.1
_COMMON_SHARE = 0.5
"""Words in more than this share of the calibration's questions say little about an image."""

_LEAST_RELEVANCE = 1e-3
_CUTS = 6
"""How often clusters that are too large are cut: each halves the share of edges."""


@dataclass(frozen=True)
class PAR(Method):
    """Tokens that answer the prompt, and few that repeat each other.

    Attributes:
        prompt: Whether the question's words rank and retrieve tokens; else all count alike.
        words: Whether common words weigh less than others.
        graph: Whether tokens are retrieved by clusters; else one by one.
        router: Whether distinctive tokens are preferred; else the most relevant ones.
        merge: Whether dropped tokens are averaged into kept ones.
        quantile: Share of the pairs of tokens that are too dissimilar for an edge.
        neighbors: Nearest tokens that may share an edge with a token.
        pool: Retrieved tokens per kept one.
        common: Ids of words that say little, found in most questions of the calibration; empty
            until then.
    """

    prompt: bool = True
    words: bool = True
    graph: bool = True
    router: bool = True
    merge: bool = True
    quantile: float = 0.9
    neighbors: int = 8
    pool: float = 3.0
    common: tuple[int, ...] = ()

    name = "par"
    label = "PAR (re-implemented from its description)"
    source = "arXiv 2410.07278"
    reads_prompt = True

    @property
    def mixes(self) -> bool:
        """Whether tokens are merged."""
        return self.merge

    @property
    def uses_prompt(self) -> bool:
        """Whether the words count."""
        return self.prompt

    @property
    def needs_questions(self) -> bool:
        """Whether common words count less, and are not known."""
        return self.prompt and self.words and not self.common

    def calibrated(self, questions: Sequence[Collection[int]]) -> Self:
        """With the words that most questions have."""
        if not self.needs_questions:
            return self
        found = Counter(word for each in questions for word in set(each))
        least = _COMMON_SHARE * len(questions)
        return replace(self, common=tuple(sorted(w for w, many in found.items() if many > least)))

    def select(self, images: Images) -> Selection:
        """Retrieve, route and merge."""
        from yopo.reduction.arithmetic import best, means, precise, unit

        features, count = precise(images.features), self.count(images.sides)
        units = unit(features - features.mean(dim=1, keepdim=True))
        cosines = units @ units.transpose(1, 2)
        threshold = _quantile(cosines, self.quantile)
        relevance = self._relevance(units, images)
        candidates = self._candidates(cosines, threshold, relevance, count)
        if self.router:
            kept = _routed(relevance, cosines, candidates, count)
        else:
            kept = best(relevance + candidates.to(relevance), count)
        if not self.merge:
            return Selection(kept)
        similar = cosines.gather(2, kept[:, None].expand(-1, cosines.shape[1], -1))
        nearest, into = similar.max(dim=2)
        into = into.masked_fill(nearest <= threshold, -1)
        places = kept.new_tensor(range(count)).expand_as(kept)
        return means(kept, into.scatter(1, kept, places))

    def _relevance(self, units: torch.Tensor, images: Images) -> torch.Tensor:
        """(images, tokens) in (0, 1]; 1 everywhere without a prompt."""
        import torch

        from yopo.reduction.arithmetic import unit

        question = images.question
        if not self.prompt or question is None:
            return torch.ones_like(units[..., 0])
        weights = question.weights.to(units)
        if question.ids is not None and self.words and self.common:
            known = torch.isin(question.ids, question.ids.new_tensor(self.common))
            weights = torch.where(known, weights * _COMMON_WEIGHT, weights)
        found = (unit(question.embeds).to(units) @ units.transpose(1, 2)).clamp(min=0)
        total = (found * weights[..., None]).sum(dim=1)
        most = total.amax(dim=1, keepdim=True).clamp(min=1e-30)
        return (total / most).clamp(min=_LEAST_RELEVANCE)

    def _candidates(
        self,
        cosines: torch.Tensor,
        threshold: torch.Tensor,
        relevance: torch.Tensor,
        count: int,
    ) -> torch.Tensor:
        """(images, tokens) bool: the retrieved tokens; all without a prompt."""
        import torch

        many, tokens = relevance.shape
        wanted = int(self.pool * count)
        if not self.prompt or wanted >= tokens:
            return torch.ones_like(relevance, dtype=torch.bool)
        labels = torch.arange(tokens, device=cosines.device).expand(many, -1)
        if self.graph:
            labels = self.clusters(cosines, threshold, count)
        return torch.stack(
            [
                _retrieved(*each, wanted, count)
                for each in zip(labels, relevance, cosines, strict=True)
            ]
        )

    def clusters(self, cosines: torch.Tensor, threshold: torch.Tensor, count: int) -> torch.Tensor:
        """(images, tokens) int64: the smallest token of each token's cluster.

        Args:
            cosines: (images, tokens, tokens).
            threshold: (images, 1), below which there is no edge.
            count: Tokens of the largest cluster, if thresholds can be raised that far.
        """
        import torch

        tokens = cosines.shape[1]
        own = torch.eye(tokens, dtype=torch.bool, device=cosines.device)
        others = cosines.masked_fill(own, float("-inf"))
        near = others.topk(min(self.neighbors, tokens - 1), dim=2).indices
        is_near = torch.zeros_like(cosines, dtype=torch.bool).scatter(2, near, True)
        is_near = is_near | is_near.transpose(1, 2)
        least = threshold[:, :, None].expand_as(cosines)
        share = 1 - self.quantile
        for _ in range(_CUTS):
            labels = _components(is_near & (others > least))
            sizes = (labels[:, :, None] == labels[:, None, :]).sum(dim=2)
            if not bool((sizes > count).any()):
                break
            share /= 2
            raised = _quantile(cosines, 1 - share)[:, :, None]
            least = torch.where((sizes > count)[:, :, None], torch.maximum(least, raised), least)
        return labels

    def choosing_flops(self, sides: Sides, width: int, words: int) -> int:
        """All pairs, and the words against all tokens."""
        asked = 2 * words * sides[0] * sides[1] * width if self.prompt else 0
        return pairs_flops(sides, width) + asked

    def problem(self) -> tuple[str, str] | None:
        """As in the base class, and parameters of the graph out of range."""
        if not 0 <= self.quantile < 1:
            return "quantile", f"must lie in [0, 1), found {self.quantile}"
        if self.neighbors < 1:
            return "neighbors", f"must be at least 1, found {self.neighbors}"
        if not self.pool >= 1:
            return "pool", f"must be at least 1, found {self.pool}"
        if not all(isinstance(each, int) and each >= 0 for each in self.common):
            return "common", "must hold token ids"
        return super().problem()


def _quantile(cosines: torch.Tensor, share: float) -> torch.Tensor:
    """(images, 1): the quantile of the cosines of different tokens."""
    tokens = cosines.shape[1]
    if tokens == 1:
        return cosines[:, 0, :1]
    pairs = cosines.flatten(1)[:, :-1].unflatten(1, (tokens - 1, tokens + 1))[:, :, 1:].flatten(1)
    place = min(int(share * pairs.shape[1]), pairs.shape[1] - 1)
    return pairs.kthvalue(place + 1, dim=1, keepdim=True).values


def _components(edges: torch.Tensor) -> torch.Tensor:
    """(images, tokens) int64: the smallest token that can be reached along (symmetric) edges."""
    import torch

    tokens = edges.shape[1]
    labels = torch.arange(tokens, device=edges.device).expand(len(edges), -1)
    while True:
        reached = labels[:, None, :].expand_as(edges).masked_fill(~edges, tokens).amin(dim=2)
        lower = torch.minimum(labels, reached)
        lower = torch.minimum(lower, lower.gather(1, lower))  # the label's own label
        if bool((lower == labels).all()):
            return labels
        labels = lower


def _retrieved(
    labels: torch.Tensor, relevance: torch.Tensor, cosines: torch.Tensor, wanted: int, count: int
) -> torch.Tensor:
    """(tokens,) bool of one image: the best clusters, and a token of each other large one."""
    import torch

    tokens = len(labels)
    names, member, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    order = relevance.argsort(descending=True, stable=True)
    order = order[member[order].argsort(stable=True)]  # by cluster, the most relevant first
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(tokens, device=labels.device) - starts[member[order]]
    first = rank < 3
    total = torch.zeros_like(names, dtype=relevance.dtype)
    total = total.index_add(0, member[order][first], relevance[order][first])
    merit = total / sizes.clamp(max=3)
    ranked = merit.argsort(descending=True, stable=True)
    before = sizes[ranked].cumsum(0) - sizes[ranked]
    is_in = torch.zeros_like(names, dtype=torch.bool)
    is_in[ranked[before < wanted]] = True
    chosen = is_in[member]
    together = labels[:, None] == labels[None, :]
    central = (cosines * together).sum(dim=1)
    for name in (~is_in & (sizes > tokens / count)).nonzero()[:, 0].tolist():
        chosen[central.masked_fill(member != name, float("-inf")).argmax()] = True
    return chosen


def _routed(
    relevance: torch.Tensor, cosines: torch.Tensor, candidates: torch.Tensor, count: int
) -> torch.Tensor:
    """(images, count) int64, ascending: relevant and distinctive candidates, greedily."""
    import torch

    from yopo.reduction.arithmetic import ascending, row

    root, nearest = relevance.sqrt(), torch.full_like(relevance, -1.0)
    taken = torch.zeros_like(candidates)
    chosen: list[torch.Tensor] = []
    for _ in range(count):
        merit = root * (1 - nearest).clamp(min=0) + 2.0 * candidates  # others last: merit <= 2
        chosen.append(merit.masked_fill(taken, float("-inf")).argmax(dim=1))
        taken = taken.scatter(1, chosen[-1][:, None], True)
        nearest = torch.maximum(nearest, row(cosines, chosen[-1]))
    return ascending(chosen)
