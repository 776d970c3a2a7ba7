"""Spend a visual budget where it prevents most damage: heads, bottlenecks, maps and neurons.

Damage is estimated in a single unit, the share of the text's residual stream that changes:

* a head that may not read costs its head effect e (capped: ``e / (1 + e)``);
* a bottleneck loses its share of what is read through it;
* an error of the visual stream - skipped attention, an update that no map replaces - costs its
  relative energy times what later layers read, times a visual weight.

The estimate is additive over layers, so for a given price per FLOP every layer has a best choice,
found by enumeration; bisecting the price meets the budget. If KV bytes are limited too, they have
a separate price, bisected in an outer loop. The estimate cannot determine the visual weight, that
is how much an error in visual states matters relative to an error in reading. So the planner tries
a few and measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from yopo.fitting.profile import Profile
from yopo.planning.paper import EMPTY
from yopo.planning.templates import Layers, TemplateBuilder, trim
from yopo.planning.weightings import Weighting
from yopo.plans.flops import visual_flops_of_layer
from yopo.plans.schema import LayerPlan, full_layer

RANKS = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Bottlenecks tried in addition to none, as shares of the hidden width."""

MAPS = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Ranks of the linear map tried, as shares of the hidden width."""

WIDTHS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Shares of the FFN tried."""

STEPS = 60
"""Bisections of the price."""

KV_STEPS = 24
"""Bisections of the price of KV bytes, where they are limited."""

MOST = 1e12
"""Highest price tried."""


@dataclass(frozen=True)
class Levers:
    """The levers that an allocation may use; an ablation restricts them.

    Attributes:
        ranks: Bottlenecks tried in addition to none, as shares of the hidden width.
        maps: Ranks of the linear map tried, as shares of the hidden width.
        widths: Shares of the FFN tried.
        attend: Whether visual tokens may attend.
        everywhere: Whether all heads must read in all layers, and visual tokens that attend have no
            radius, as an inference engine requires.
    """

    ranks: tuple[float, ...] = RANKS
    maps: tuple[float, ...] = MAPS
    widths: tuple[float, ...] = WIDTHS
    attend: bool = True
    everywhere: bool = False


@dataclass(frozen=True)
class Choice:
    """A candidate for a layer, with its cost and damage.

    Attributes:
        layer: The layer's plan.
        flops: FLOPs of visual tokens.
        damage: Estimated damage.
        kv: Share of the dense model's visual KV bytes.
    """

    layer: LayerPlan
    flops: int
    damage: float
    kv: float = 0.0


class Allocator:
    """Allocates a budget for one model.

    Args:
        builder: Provides the model, the scores and the budget.
        profile: Energies of what could be skipped.
        weighting: Relative weights of the kinds of damage.
        levers: The levers that may be used; None: all.
    """

    def __init__(
        self,
        builder: TemplateBuilder,
        profile: Profile,
        weighting: Weighting,
        levers: Levers | None = None,
    ):
        self.levers = levers or Levers()
        self.builder, self.profile = builder, profile
        self.radius = None if self.levers.everywhere else weighting.radius
        self.shape, self.workload = builder.shape, builder.workload
        reading = builder.statistics.reading
        from_here = reading.sum(dim=1).flip(0).cumsum(0).flip(0)
        # An error of the visual stream can only damage what later layers read.
        later = torch.cat([from_here[1:], from_here.new_zeros(1)])
        self.later = (
            weighting.visual_weight * later * torch.tensor(weighting.visual, dtype=later.dtype)
        )
        self.reading = reading * torch.tensor(weighting.reading, dtype=later.dtype)[:, None]

    def allocate(self) -> Layers | None:
        """Layers within the budgets; None if no layer that reads fits."""
        least = (LayerPlan((0,), attend_heads=(), radius=None, neurons=0),)
        if not self.builder.keeps_kv(least):  # not even one KV head fits: no need to try prices
            return None
        best = self._at_kv_price(0.0)
        if best is not None and not self.builder.keeps_kv(best):
            best = self._within_kv()
        return best if best and any(layer.read_heads for layer in best) else None

    def _within_kv(self) -> Layers | None:
        """Layers at the lowest price of KV bytes that meets the budget of KV bytes."""

        def at(price: float) -> Layers | None:
            layers = self._at_kv_price(price)
            return layers if layers is not None and self.builder.keeps_kv(layers) else None

        low, high, best = 0.0, 1.0, at(1.0)
        while best is None and high < MOST:
            low, high = high, high * 4.0
            best = at(high)
        return None if best is None else _cheapest(at, low, high, best, KV_STEPS)

    def _at_kv_price(self, kv_price: float) -> Layers | None:
        """Layers at the lowest price of FLOPs that meets the budget of FLOPs."""
        low, high = 0.0, 1.0
        best = self._layers(high, kv_price)
        while best is None:
            high *= 4.0
            if high > MOST:
                return None
            best = self._layers(high, kv_price)
        return _cheapest(lambda price: self._layers(price, kv_price), low, high, best, STEPS)

    def _layers(self, price: float, kv_price: float) -> Layers | None:
        """Every layer's best choice at prices (per dense visual FLOPs, and per dense visual KV
        bytes); None if they exceed the budget of FLOPs."""
        layers = trim(
            tuple(self._best(number, price, kv_price) for number in range(self.shape.layers))
        )
        return layers if self.builder.cost(layers) <= self.builder.budget else None

    def _best(self, number: int, price: float, kv_price: float) -> LayerPlan:
        price = price / self._dense
        attention = min(
            self._attention_choices(number, price, kv_price),
            key=lambda each: each.damage + price * each.flops + kv_price * each.kv,
        )
        ffn = min(self._ffn_choices[number], key=lambda each: each.damage + price * each.flops)
        return replace(attention.layer, neurons=ffn.layer.neurons, map_rank=ffn.layer.map_rank)

    @cached_property
    def _dense(self) -> int:
        return self.shape.layers * self._flops(full_layer(self.shape))

    def _flops(self, layer: LayerPlan) -> int:
        return visual_flops_of_layer(layer, self.shape, self.workload)

    def _attention_choices(self, number: int, price: float, kv_price: float) -> Iterator[Choice]:
        """For every bottleneck, the heads whose gain through it exceeds their price."""
        reading, mixing = self._gains[number]
        missed = sum(reading) + sum(mixing)
        kv_share = 1 / (self.shape.layers * self.shape.kv_heads)
        if not self.levers.everywhere:
            yield Choice(EMPTY, 0, missed)
        for rank in self._ranks:
            lost = float(
                self.profile.bottleneck_residual[number][
                    self.shape.hidden if rank is None else rank
                ]
            )
            start, kv_flops, attend_flops = self._head_flops(rank)
            heads: list[int] = []
            attend: list[int] = []
            for group in range(self.shape.kv_heads):
                members = range(group * self.shape.group, (group + 1) * self.shape.group)
                gains = {h: (1 - lost) * mixing[h] for h in members if self.levers.attend}
                busy = [head for head, each in gains.items() if each > price * attend_flops]
                gain = sum(reading[h] for h in members) + sum(mixing[h] for h in busy)
                gain *= 1 - lost
                cost = price * (kv_flops + len(busy) * attend_flops) + kv_price * kv_share
                if self.levers.everywhere or gain > cost:
                    heads += members
                    attend += busy
            if heads:
                gain = sum(reading[h] for h in heads) + sum(mixing[h] for h in attend)
                gain *= 1 - lost
                groups = len(heads) // self.shape.group
                flops = start + groups * kv_flops + len(attend) * attend_flops
                layer = self._reading(tuple(heads), tuple(attend), rank)
                yield Choice(layer, flops, missed - gain, groups * kv_share)

    def _reading(
        self, heads: tuple[int, ...], attend: tuple[int, ...], rank: int | None
    ) -> LayerPlan:
        return LayerPlan(heads, attend, self.radius if attend else None, 0, rank)

    @cached_property
    def _gains(self) -> list[tuple[list[float], list[float]]]:
        """Gains of reading and of attending in each head, layer by layer."""
        mixing = self.later[:, None] * self.profile.mixing
        return list(zip(self.reading.tolist(), mixing.tolist(), strict=True))

    def _head_flops(self, rank: int | None) -> tuple[int, int, int]:
        """FLOPs of reading at all, per additional KV head read, per additional attending head."""
        cached = self._head_flops_of.get(rank)
        if cached is None:
            group = self.shape.group
            all_kv = tuple(range(self.shape.heads))
            most = self._flops(self._reading(all_kv, (), rank))
            kv = 0
            if self.shape.kv_heads > 1:
                kv = most - self._flops(self._reading(all_kv[group:], (), rank))
            one = self._flops(self._reading(all_kv, (0,), rank)) - most
            start = self._flops(self._reading((0,), (), rank)) - kv
            cached = self._head_flops_of[rank] = (start, kv, one)
        return cached

    @cached_property
    def _head_flops_of(self) -> dict[int | None, tuple[int, int, int]]:
        return {}

    @cached_property
    def _ranks(self) -> list[int | None]:
        hidden = self.shape.hidden
        return [None, *sorted({max(1, round(share * hidden)) for share in self.levers.ranks})]

    @cached_property
    def _ffn_choices(self) -> list[list[Choice]]:
        """Neurons and maps of every layer, with their cost and the damage that remains."""
        shape = self.shape
        maps = sorted({round(share * shape.hidden) for share in self.levers.maps})
        widths = sorted({round(share * shape.ffn) for share in self.levers.widths})
        ordered = self.builder.statistics.importance.sort(dim=1, descending=True).values
        shares = torch.cat([ordered.new_zeros(len(ordered), 1), ordered.cumsum(dim=1)], dim=1)
        shares = shares / shares[:, -1:].clamp(min=1e-30)
        choices = []
        for number in range(shape.layers):
            weight, found = float(self.later[number]), []
            nonlinear, by_rank = (
                float(self.profile.nonlinear_residual[number]),
                self.profile.map_residual[number],
            )
            for width in widths:
                share = float(shares[number, width])
                for rank in maps if width < shape.ffn else (0,):
                    # Neurons provide their share of the update, maps the linear part of the rest.
                    unmapped = max(float(by_rank[rank]) - nonlinear, 0.0)
                    left = (1 - share) * (nonlinear + unmapped)
                    layer = replace(EMPTY, neurons=width, map_rank=rank)
                    found.append(Choice(layer, self._flops(layer), weight * left))
            choices.append(found)
        return choices


def _cheapest(
    at: Callable[[float], Layers | None], low: float, high: float, best: Layers, steps: int
) -> Layers:
    """Bisect the lowest price at which a choice fits: none at ``low``, ``best`` at ``high``."""
    for _ in range(steps):
        price = (low + high) / 2
        found = at(price)
        if found is None:
            low = price
        else:
            high, best = price, found
    return best
