"""Heads that are worth their price, of all layers and bottlenecks at once.

An allocation under two budgets tries more than a thousand pairs of prices, each for every layer,
bottleneck and head, so this is one computation on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch

from yopo.planning.templates import TemplateBuilder
from yopo.plans.flops import visual_flops_of_layer
from yopo.plans.schema import LayerPlan

Reading = Callable[[tuple[int, ...], tuple[int, ...], int | None], LayerPlan]
"""Makes a layer's plan from reading heads, attending heads and a bottleneck."""

Heads = tuple[tuple[int, ...], tuple[int, ...]]
"""(reading, attending) query heads."""


@dataclass(frozen=True)
class HeadCosts:
    """Costs of visual tokens in the attention of a layer, per bottleneck; (ranks,) float64.

    Attributes:
        start: FLOPs of reading at all.
        kv: FLOPs of each additional KV head that is read.
        attend: FLOPs of each additional head in which visual tokens attend.
        start_bytes: Share of the dense model's visual KV bytes that reading at all takes: the
            latent's, where it is cached.
        kv_bytes: The same of each additional KV head; 0 where the latent is cached.
    """

    start: torch.Tensor
    kv: torch.Tensor
    attend: torch.Tensor
    start_bytes: torch.Tensor
    kv_bytes: torch.Tensor

    @classmethod
    def of(
        cls, builder: TemplateBuilder, reading: Reading, ranks: Sequence[int | None]
    ) -> HeadCosts:
        """The costs of a model's layers.

        Args:
            builder: Knows the model, and how its layers will be stored.
            reading: Makes a layer's plan from reading heads, attending heads and a bottleneck.
            ranks: The bottlenecks; None: none.
        """
        shape, workload = builder.shape, builder.workload
        heads, others = tuple(range(shape.heads)), max(shape.kv_heads - 1, 1)
        rows = []
        for rank in ranks:
            one, most = reading(heads[: shape.group], (), rank), reading(heads, (), rank)
            attending = reading(heads, (0,), rank)
            least, flops, attend = (
                visual_flops_of_layer(each, shape, workload) for each in (one, most, attending)
            )
            least_bytes, kv_bytes = builder.kv_share((one,)), builder.kv_share((most,))
            per_head = (flops - least) / others, (kv_bytes - least_bytes) / others
            start = least - per_head[0], least_bytes - per_head[1]
            rows.append((start[0], per_head[0], attend - flops, start[1], per_head[1]))
        return cls(*torch.tensor(rows, dtype=torch.float64).unbind(1))


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

    def heads(self, ranks: Sequence[int]) -> list[Heads]:
        """The heads of every layer with a bottleneck, one for each layer."""
        place = torch.arange(len(ranks)), torch.tensor(ranks)
        attend = self.attend[place]
        read = self.read[place][..., None].expand_as(attend)
        rows = zip(read.flatten(1).tolist(), attend.flatten(1).tolist(), strict=True)
        heads = range(attend[0].numel())
        return [(tuple(compress(heads, one)), tuple(compress(heads, two))) for one, two in rows]


class PricedHeads:
    """Gains and costs of all heads.

    Args:
        reading: (L, G, M) float64, gain of reading in a head.
        mixing: (L, G, M) float64, gain of attending in a head.
        lost: (L, R) float64, share of both that a bottleneck loses.
        costs: Per bottleneck.
        everywhere: Whether all heads are read in all layers, whatever their gain.
    """

    def __init__(
        self,
        reading: torch.Tensor,
        mixing: torch.Tensor,
        lost: torch.Tensor,
        costs: HeadCosts,
        *,
        everywhere: bool = False,
    ):
        kept = 1 - lost
        self._reading = kept[:, :, None] * reading.sum(dim=-1)[:, None]
        self._mixing = kept[:, :, None, None] * mixing[:, None]
        self._costs, self._everywhere = costs, everywhere

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
        net = gain - cost - kv_price * costs.kv_bytes[:, None]
        read = torch.ones_like(net, dtype=torch.bool) if self._everywhere else net > 0
        whole = torch.where(read, net, 0.0).sum(dim=-1)
        whole = whole - price * costs.start - kv_price * costs.start_bytes
        whole = torch.where(read.any(dim=-1), whole, -torch.inf)
        return Selected(read, busy & read[..., None], whole, self._everywhere)
