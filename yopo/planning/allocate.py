"""Spend a visual budget where it prevents most damage: heads, bottlenecks, maps and neurons.

Damage is estimated in a single unit, the share of the text's residual stream that changes:

* a head that may not read costs what it adds to the text's residual stream, relative to the
  stream after its layer;
* a bottleneck loses its share of what is read through it;
* an error of the visual stream - skipped attention, an update that no map replaces - costs its
  energy, relative to the visual stream that a later layer reads, times what that layer reads,
  summed over later layers, times a visual weight.

The estimate is additive over layers, so for a given price per FLOP every layer has a best choice,
found by enumeration; bisecting the price meets the budget, and the rest is spent on single better
choices. If KV bytes are limited too, they have a separate price, bisected in an outer loop. The
estimate cannot determine the visual weight, that is how much an error in visual states matters
relative to an error in reading. So the planner tries a few and measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch

from yopo.fitting.profile import Profile
from yopo.planning.choices import Choice, Choices, spend_rest
from yopo.planning.levers import Levers
from yopo.planning.paper import EMPTY
from yopo.planning.priced import HeadCosts, PricedHeads
from yopo.planning.templates import Layers, TemplateBuilder, trim
from yopo.planning.weightings import Weighting
from yopo.plans.schema import LayerPlan

STEPS = 60
"""Bisections of the price."""

KV_STEPS = 24
"""Bisections of the price of KV bytes, where they are limited."""

PRECISION = 1e-6
"""Relative precision of prices at which bisections stop."""

MOST = 1e12
"""Highest price tried."""

Priced = tuple[Layers, float]
"""Layers, and the price of FLOPs that they were chosen at."""

DISCOUNTS = (1.0, 0.25, 1 / 16, 0.0)
"""Factors on the price at which heads are chosen for the rest of a budget."""


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
        has_neighbors = not self.levers.everywhere and builder.statistics.reduction is None
        self.radius = weighting.radius if has_neighbors else None
        self.shape, self.workload = builder.shape, builder.workload
        self._dense = builder.dense_flops
        reading = builder.statistics.reading
        later = read_later(reading.sum(dim=1), profile.stream)
        self.later = (
            weighting.visual_weight * later * torch.tensor(weighting.visual, dtype=later.dtype)
        )
        self.reading = reading * torch.tensor(weighting.reading, dtype=later.dtype)[:, None]

    def allocate(self) -> Layers | None:
        """Layers within the budgets; None if no layer that reads fits."""
        least = ((self._reading((0,), (), rank),) for rank in self._ranks)
        if not any(map(self.builder.keeps_kv, least)):  # no need to try prices
            return None
        best = self._at_kv_price(0.0)
        if best is not None and not self.builder.keeps_kv(best[0]):
            best = self._within_kv()
        reads = best is not None and any(layer.read_heads for layer in best[0])
        return self._with_rest_spent(*best) if best is not None and reads else None

    def _within_kv(self) -> Priced | None:
        """Layers at the lowest price of KV bytes that meets the budget of KV bytes."""

        def at(price: float) -> Priced | None:
            found = self._at_kv_price(price)
            return found if found is not None and self.builder.keeps_kv(found[0]) else None

        low, high, best = 0.0, 1.0, at(1.0)
        while best is None and high < MOST:
            low, high = high, high * 4.0
            best = at(high)
        return None if best is None else _cheapest(at, low, high, best, KV_STEPS)

    def _at_kv_price(self, kv_price: float) -> Priced | None:
        """Layers at the lowest price of FLOPs that meets the budget of FLOPs."""
        low, high = 0.0, 1.0
        best = self._layers(high, kv_price)
        while best is None:
            high *= 4.0
            if high > MOST:
                return None
            best = self._layers(high, kv_price)
        return _cheapest(lambda price: self._layers(price, kv_price), low, high, best, STEPS)

    def _layers(self, price: float, kv_price: float) -> Priced | None:
        """Every layer's best choice at prices (per dense visual FLOPs, and per dense visual KV
        bytes); None if they exceed the budget of FLOPs."""
        selected = self._priced.select(price / self._dense, kv_price)
        ffn = (self._ffn_damage + price / self._dense * self._ffn_flops).argmin(dim=1).tolist()
        best, layers = selected.best(), []
        heads = selected.heads([rank or 0 for rank in best])
        for number, rank in enumerate(best):
            layer = self._ffn_choices[number][ffn[number]].layer
            if rank is not None:
                layer = self._reading(*heads[number], self._ranks[rank], layer)
            layers.append(layer)
        found = trim(tuple(layers))
        return (found, price) if self.builder.cost(found) <= self.builder.budget else None

    def damage(self, layers: Layers) -> float:
        """The estimated damage of layers that are made of this allocator's choices."""
        return sum(
            self._attention(number, layer).damage + self._ffn(number, layer).damage
            for number, layer in enumerate(layers)
        )

    def _ffn(self, number: int, layer: LayerPlan) -> Choice:
        """The FFN of a layer's plan as a choice."""
        asked = replace(EMPTY, neurons=layer.neurons, map_rank=layer.map_rank)
        return next(each for each in self._ffn_choices[number] if each.layer == asked)

    def _with_rest_spent(self, layers: Layers, price: float) -> Layers:
        """Layers chosen at a price, with better choices where the rest of the budget allows."""
        last = max(number for number, layer in enumerate(layers) if layer.read_heads)
        prices = (discount * price / self._dense for discount in DISCOUNTS)
        by_price = [self._attention_choices(each) for each in prices]
        chosen: list[Choice] = []
        options: list[list[Choice]] = []
        for number, layer in enumerate(layers):
            ffn = self._ffn(number, layer) if number < last else Choice(EMPTY, 0, 0.0)
            attention = [
                each
                for of_layers in by_price
                for each in of_layers[number]
                if number < last or not each.layer.attend_heads
            ]
            chosen += [self._attention(number, layer), ffn]
            options += [attention, self._ffn_choices[number] if number < last else []]

        def fits(choices: Choices) -> bool:
            return self.builder.fits(trim(_joined(choices)))

        room = int(self.builder.budget * self._dense) - sum(each.flops for each in chosen)
        return trim(_joined(spend_rest(tuple(chosen), options, room, fits)))

    def _attention_choices(self, price: float) -> list[list[Choice]]:
        """For every layer and bottleneck, the heads whose gain through it exceeds their price per
        FLOP."""
        selected, numbers = self._priced.select(price, 0.0), range(self.shape.layers)
        skipped = [] if self.levers.everywhere else [EMPTY]
        choices = [[self._attention(number, each) for each in skipped] for number in numbers]
        for index, rank in enumerate(self._ranks):
            for number, (reading, attending) in enumerate(selected.heads([index] * len(numbers))):
                if reading:
                    layer = self._reading(reading, attending, rank)
                    choices[number].append(self._attention(number, layer))
        return choices

    @cached_property
    def _priced(self) -> PricedHeads:
        shape = self.shape
        per_group = (shape.kv_heads, shape.group)
        mixing = self.later[:, None] * self.profile.mixing
        lost = [[self._lost(n, rank) for rank in self._ranks] for n in range(shape.layers)]
        return PricedHeads(
            self.reading.unflatten(1, per_group),
            mixing.unflatten(1, per_group) * self.levers.attend,
            torch.tensor(lost, dtype=torch.float64),
            self._costs,
            everywhere=self.levers.everywhere,
        )

    @cached_property
    def _costs(self) -> HeadCosts:
        return HeadCosts.of(self.builder, self._reading, self._ranks)

    def _attention(self, number: int, layer: LayerPlan) -> Choice:
        """The attention of a layer's plan as a choice."""
        reading, mixing = self._gains[number]
        missed = sum(reading) + sum(mixing)
        if not layer.read_heads:
            return Choice(EMPTY, 0, missed)
        lost = self._lost(number, layer.qkv_rank)
        gain = sum(reading[h] for h in layer.read_heads)
        gain += sum(mixing[h] for h in layer.attend_heads)
        layer = replace(layer, neurons=0, map_rank=0)
        return Choice(layer, self.builder.flops_of(layer), missed - (1 - lost) * gain)

    def _lost(self, number: int, rank: int | None) -> float:
        """Share of what is read that a bottleneck loses."""
        rank = self.shape.hidden if rank is None else rank
        return float(self.profile.bottleneck_residual[number][rank])

    def _reading(
        self,
        heads: tuple[int, ...],
        attend: tuple[int, ...],
        rank: int | None,
        ffn: LayerPlan = EMPTY,
    ) -> LayerPlan:
        """A layer that reads, with the FFN of another."""
        radius = self.radius if attend else None
        return LayerPlan(heads, attend, radius, ffn.neurons, rank, ffn.map_rank)

    @cached_property
    def _gains(self) -> list[tuple[list[float], list[float]]]:
        """Gains of reading and of attending in each head, layer by layer."""
        mixing = self.later[:, None] * self.profile.mixing
        return list(zip(self.reading.tolist(), mixing.tolist(), strict=True))

    @cached_property
    def _ranks(self) -> list[int | None]:
        hidden = self.shape.hidden
        return [None, *sorted({max(1, round(share * hidden)) for share in self.levers.ranks})]

    @cached_property
    def _ffn_damage(self) -> torch.Tensor:
        """(layers, choices) damage of the FFN's choices."""
        rows = [[each.damage for each in row] for row in self._ffn_choices]
        return torch.tensor(rows, dtype=torch.float64)

    @cached_property
    def _ffn_flops(self) -> torch.Tensor:
        """(choices,) FLOPs of the FFN's choices, which are the same in all layers."""
        return torch.tensor([each.flops for each in self._ffn_choices[0]], dtype=torch.float64)

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
                    found.append(Choice(layer, self.builder.flops_of(layer), weight * left))
            choices.append(found)
        return choices


def read_later(reading: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """What later layers read of an error that is as large as the visual stream after a layer.

    The residual stream carries an error on while the stream itself grows, so a reader sees the
    error relative to the stream that it reads.

    Args:
        reading: (layers,) what each layer reads.
        stream: (layers + 1,) energies of the visual stream before every layer and after the last.
    """
    from_here = (reading / stream[:-1].clamp(min=1e-30)).flip(0).cumsum(0).flip(0)
    return stream[1:] * torch.cat([from_here[1:], from_here.new_zeros(1)])


def _joined(choices: Choices) -> Layers:
    """Layers of a choice for every layer's attention and FFN in turn."""
    return tuple(
        replace(attention.layer, neurons=ffn.layer.neurons, map_rank=ffn.layer.map_rank)
        for attention, ffn in zip(choices[::2], choices[1::2], strict=True)
    )


def _cheapest(
    at: Callable[[float], Priced | None], low: float, high: float, best: Priced, steps: int
) -> Priced:
    """Bisect the lowest price at which a choice fits: none at ``low``, ``best`` at ``high``."""
    for _ in range(steps):
        if high - low <= PRECISION * high:
            break
        price = (low + high) / 2
        found = at(price)
        if found is None:
            low = price
        else:
            high, best = price, found
    return best
