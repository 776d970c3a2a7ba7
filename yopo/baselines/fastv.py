"""FastV: after layer K = 2, only the visual tokens that the last prompt token attends to most.

"An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764): tokens are ranked by the attention
that they receive in layer K from the last token, as a mean over heads. This needs only one row of
the attention matrix, computed in float32, so the layer itself runs fused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch

from yopo.baselines.baseline import share_of
from yopo.baselines.dropping import Dropping
from yopo.baselines.prefill import Between, FinishedLayer
from yopo.plans.schema import ModelShape, Workload

FIRST_LAYERS = 2
"""Layers before the drop (K); the attention of the last of them ranks the tokens."""


@dataclass(frozen=True)
class FastV(Dropping):
    """All visual tokens in the first K layers, a share of them after those.

    Attributes:
        share: Share of the visual tokens kept after the drop (R).
    """

    share: float = 0.0

    name = "fastv"
    label = "FastV"
    source = "arXiv 2403.06764"
    least_layers = 1

    @classmethod
    def choices(cls, shape: ModelShape, workload: Workload) -> Iterable[Self]:
        """The paper's K, with every number of tokens."""
        visual, before = max(workload.visual, 1), min(FIRST_LAYERS, shape.layers)
        return (cls(before, count / visual) for count in range(visual + 1))

    def kept(self, visual: int) -> int:
        """A share of the tokens."""
        return share_of(self.share, visual)

    def extra_flops(self, shape: ModelShape, workload: Workload) -> int:
        """FLOPs of ranking: one more query projection and one row of logits."""
        if self.layers >= shape.layers:
            return 0
        keys = shape.hidden + workload.visual + workload.text
        return 2 * keys * shape.heads * shape.head_dim

    def choose(self, between: Between, count: int) -> torch.Tensor:
        """The tokens with the highest attention: (batch, count) int64, ascending."""
        if not count:
            return between.stream.visual[:, :0]
        assert between.previous is not None, "least_layers"
        row = last_row(between.previous, between.ends, between.real)
        best = row.gather(1, between.stream.visual).topk(count, dim=1).indices
        return best.sort(dim=1).values

    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """The layer and the share."""
        return f"K = {self.layers} of {shape.layers} layers, R = {100 * self.share:.1f} %"


def last_row(layer: FinishedLayer, ends: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The attention of one query per prompt over everything before it, mean over heads.

    Args:
        layer: The layer that attends, its input and its keys.
        ends: (batch,) int64, position of the prompt's last token.
        real: (batch, length) bool, False on padding; None: no padding.

    Returns:
        (batch, length) float32, each row sums to 1.
    """
    names, entered, keys = layer.names, layer.entered, layer.keys
    attention: Any = layer.module.self_attn
    rows = torch.arange(len(ends), device=ends.device)
    normed = getattr(layer.module, names.attention_norm)(entered.hidden[rows, ends][:, None])
    width = attention.config.num_attention_heads * attention.head_dim  # first, if it is fused
    query = getattr(attention, names.query)(normed)[..., :width]
    query = query.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    if names.head_norms is not None:
        query = getattr(attention, names.head_norms[0])(query)
    cos, sin = (each.expand(len(ends), -1, -1)[rows, ends][:, None] for each in entered.rotary)
    query = names.rotate(query, query, cos, sin)[0]  # (batch, heads, 1, head_dim)
    grouped = query.float().unflatten(1, (keys.shape[1], -1)).squeeze(3)
    logits = grouped @ keys.float().transpose(-1, -2) * attention.scaling
    place = torch.arange(keys.shape[2], device=keys.device)
    allowed = place[None] <= ends[:, None]
    if real is not None:
        allowed = allowed & real
    logits = logits.masked_fill(~allowed[:, None, None], float("-inf"))
    return logits.softmax(dim=-1).mean(dim=(1, 2))
