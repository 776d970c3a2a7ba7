"""Heads that are worth their price, of all layers and bottlenecks at once.

An allocation under two budgets tries more than a thousand pairs of prices, each for every layer,
bottleneck and head, so this is one computation on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadCosts:
    """FLOPs of visual tokens in the attention of a layer, per bottleneck; (ranks,) float64.

    Attributes:
        start: Of reading at all.
        kv: Of each additional KV head that is read.
        attend: Of each additional head in which visual tokens attend.
    """

    start: torch.Tensor
    kv: torch.Tensor
    attend: torch.Tensor


@dataclass(frozen=True)
class Selected:
    """Heads selected at prices. L layers, R bottlenecks, G KV heads, each with M query heads.

    Attributes:
        read: (L, R, G) bool, KV heads that are read.
        attend: (L, R, G, M) bool, query heads in which visual tokens attend.
        net: (L, R) float64, prevented damage less what it costs at these prices; minus infinity
            where no head is read.
        everywhere: Whether every layer has to read, at whatever price.
    """

    read: torch.Tensor
    attend: torch.Tensor
    net: torch.Tensor
    everywhere: bool = False

    def best(self) -> list[int | None]:
        """The best bottleneck of every layer; None where reading nothing is as good and allowed."""
        net, rank = self.net.max(dim=1)
        pairs = zip(net.tolist(), rank.tolist(), strict=True)
        return [index if value > 0 or self.everywhere else None for value, index in pairs]

    def heads(self, layer: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(reading, attending) query heads of a layer with a bottleneck."""
        attend = self.attend[layer, rank]
        read = self.read[layer, rank][:, None].expand_as(attend)
        found = (tuple(each.flatten().nonzero().flatten().tolist()) for each in (read, attend))
        reading, attending = found
        return reading, attending


class PricedHeads:
    """Gains and costs of all heads.

    Args:
        reading: (L, G, M) float64, gain of reading in a head.
        mixing: (L, G, M) float64, gain of attending in a head.
        lost: (L, R) float64, share of both that a bottleneck loses.
        costs: FLOPs per bottleneck.
        kv_share: Share of the dense model's visual KV bytes that one KV head takes.
        everywhere: Whether all heads are read in all layers, whatever their gain.
    """

    def __init__(
        self,
        reading: torch.Tensor,
        mixing: torch.Tensor,
        lost: torch.Tensor,
        costs: HeadCosts,
        kv_share: float,
        *,
        everywhere: bool = False,
    ):
        kept = 1 - lost
        self._reading = kept[:, :, None] * reading.sum(dim=-1)[:, None]
        self._mixing = kept[:, :, None, None] * mixing[:, None]
        self._costs, self._kv_share, self._everywhere = costs, kv_share, everywhere

    def select(self, price: float, kv_price: float) -> Selected:
        """The heads whose gain exceeds their cost.

        Args:
            price: Damage that one FLOP must prevent.
            kv_price: Damage that all visual KV bytes of the dense model must prevent.
        """
        costs = self._costs
        busy = self._mixing > price * costs.attend[:, None, None]
        gain = self._reading + torch.where(busy, self._mixing, 0.0).sum(dim=-1)
        cost = price * (costs.kv[:, None] + busy.sum(dim=-1) * costs.attend[:, None])
        net = gain - cost - kv_price * self._kv_share
        read = torch.ones_like(net, dtype=torch.bool) if self._everywhere else net > 0
        whole = torch.where(read, net, 0.0).sum(dim=-1) - price * costs.start
        whole = torch.where(read.any(dim=-1), whole, -torch.inf)
        return Selected(read, busy & read[..., None], whole, self._everywhere)
