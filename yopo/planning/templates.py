"""Candidate plan templates, each scaled to a budget by the scores.

No template suits every model: what the *text* may read and what the *visual stream* computes have
very different costs, and only measuring shows which of them a model can do without. So the planner
measures these few, which differ in kind:

* ``paper``: a cut, the most active heads read and attend, a share of the neurons.
* ``reader``: visual tokens are frozen; the layers whose text looks at the image most may read it.
* ``reader-heads``: frozen; all layers may read, with the heads that have the largest effect.
* ``reader-prefix``: frozen; the first layers may read, then visual tokens are gone.
* ``attend``: as ``reader``, and in the first layers visual tokens attend to their neighbors.
* ``frozen-late``: the first layers are complete, in the others visual tokens are frozen (ShortV).
* ``frozen-early``: visual tokens are frozen until the last layers that are read.
* ``withdraw``: the first layers are complete, then visual tokens are gone (VTW).
* ``light``: three quarters of the layers read and attend nearby, with few neurons.
* ``thin``: every layer reads and attends nearby, with few neurons.
* ``op-skip``: every layer reads; the first ones attend and run their FFN, whole or not at all.

The rest of the budget goes to FFN neurons by importance, but for ``op-skip``. The last reading
layer never computes queries or an FFN for visual tokens, as no layer would read the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial

import torch

from yopo.calibration.statistics import Statistics
from yopo.planning.op_skip import OP_SKIP, Policy
from yopo.planning.paper import EMPTY, kept_heads, paper_layers
from yopo.plans.flops import (
    dense_visual_flops,
    dense_visual_kv_bytes,
    flops_of_reduction,
    visual_flops_of_layer,
    visual_kv_bytes_of_layer,
)
from yopo.plans.schema import LayerPlan, full_layer
from yopo.strategies import heads as head_strategy
from yopo.strategies.layers import select_readers
from yopo.strategies.neighbors import PAPER_RADIUS
from yopo.strategies.neurons import rank, select_widths

Layers = tuple[LayerPlan, ...]
Build = Callable[[float], Layers]

STEPS = 4096
"""Resolution at which a template is scaled to the budget."""


class TemplateBuilder:
    """Builds candidate layers for one model at one visual budget.

    Args:
        statistics: The calibration's measurements.
        budget: Visual FLOPs over dense visual FLOPs, in (0, 1], those of a reduction included.
        groups: Number of query heads kept or dropped together (a KV head's, or 1).
        kv_budget: Allowed visual KV bytes over the dense model's, in (0, 1].
        stored: How a layer will be stored, which decides on its KV bytes; None: as it is.

    Attributes:
        workload: The prompt as layers see it, after the statistics' reduction.
        budget: What the reduction leaves of the budget to the layers.
        dense_flops: Visual FLOPs of the dense model, for the whole prompt.
        flops_of: Visual FLOPs of a layer; allocations ask for those of the same ones again.
    """

    def __init__(
        self,
        statistics: Statistics,
        budget: float,
        *,
        groups: int = 1,
        kv_budget: float = 1.0,
        stored: Callable[[LayerPlan], LayerPlan] | None = None,
    ):
        self.statistics, self.groups = statistics, groups
        self.kv_budget, self._stored = kv_budget, stored
        self.shape, self._whole = statistics.model.shape, statistics.workload
        self.workload = self._whole.after(statistics.reduction)
        self.dense_flops = dense_visual_flops(self.shape, self._whole)
        choosing = flops_of_reduction(statistics.reduction, self.shape, self._whole)
        self._asked, self.budget = budget, budget - choosing / self.dense_flops
        self._all_heads = tuple(range(self.shape.heads))
        flops = partial(visual_flops_of_layer, shape=self.shape, workload=self.workload)
        self.flops_of: Callable[[LayerPlan], int] = lru_cache(4096)(flops)
        self.reader_layer = LayerPlan(self._all_heads, attend_heads=(), radius=None, neurons=0)

    def with_kv_budget(
        self, kv_budget: float, stored: Callable[[LayerPlan], LayerPlan] | None = None
    ) -> TemplateBuilder:
        """The same with another budget of KV bytes, for layers stored in some way."""
        return TemplateBuilder(
            self.statistics,
            self._asked,
            groups=self.groups,
            kv_budget=kv_budget,
            stored=stored,
        )

    def cost(self, layers: Layers) -> float:
        """Visual budget of some layers."""
        return sum(map(self.flops_of, layers)) / self.dense_flops

    def kv_share(self, layers: Layers) -> float:
        """Visual KV bytes of some layers over the dense model's, 16-bit numbers where whole."""
        layers = layers if self._stored is None else tuple(map(self._stored, layers))
        each = (visual_kv_bytes_of_layer(layer, self.shape, self.workload) for layer in layers)
        return sum(each) / dense_visual_kv_bytes(self.shape, self._whole)

    def fits(self, layers: Layers) -> bool:
        """Whether layers are within both budgets."""
        return self.cost(layers) <= self.budget and self.keeps_kv(layers)

    def keeps_kv(self, layers: Layers) -> bool:
        """Whether layers are within the budget of KV bytes."""
        return self.kv_share(layers) <= self.kv_budget + 1e-9

    def candidates(self) -> Iterator[tuple[str, Layers]]:
        """Yield (name, layers) of every template that fits, without duplicates."""
        seen: set[Layers] = set()
        for name in TEMPLATES:
            layers = self.candidate(name)
            if layers is not None and layers not in seen:
                seen.add(layers)
                yield name, layers

    def candidate(self, name: str) -> Layers | None:
        """One shape by name; None if it does not fit, nothing in it is read, or a reduction leaves
        none of the neighborhoods that it needs."""
        if name in NEARBY and self.statistics.reduction is not None:
            return None
        layers = self.build(name)
        if layers is None or not self.fits(layers):
            return None
        return layers if any(layer.read_heads for layer in layers) else None

    def build(self, name: str) -> Layers | None:
        """The layers of a template; None if even its smallest form exceeds the budget."""
        return TEMPLATES[name](self)

    def scale(self, build: Build) -> Layers | None:
        """The largest form of a template within the budgets; None if its smallest exceeds one.

        Args:
            build: Scale in [0, 1] -> layers, of non-decreasing cost and KV bytes.
        """
        if not self.fits(trim(build(0.0))):
            return None
        low, high = 0, STEPS
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(trim(build(middle / STEPS))):
                low = middle
            else:
                high = middle - 1
        return trim(build(low / STEPS))

    def fill(self, layers: Layers | None) -> Layers | None:
        """Spend the rest on FFN neurons, by importance, in layers before the last reader."""
        if layers is None:
            return None
        open_layers = list(range(_last_reader(layers)))
        ranked = rank(self.statistics.importance, open_layers)
        room = sum(self.shape.ffn - layers[index].neurons for index in open_layers)

        def build(scale: float) -> Layers:
            count = int(scale * room)
            widths = select_widths(ranked, count, self.shape.layers)
            return tuple(
                replace(layer, neurons=max(layer.neurons, width))
                for layer, width in zip(layers, widths, strict=True)
            )

        return self.scale(build)

    def paper(self) -> Layers | None:
        """Half of the layers, or as many as the budget needs if they do everything nearby."""
        total = self.shape.layers
        whole = replace(full_layer(self.shape), radius=PAPER_RADIUS)
        needed = math.ceil(self.budget / self.cost((whole,)) - 1e-9)
        visual = min(total, max(round(total / 2), needed) + 1)  # the last one only reads
        return self.scale(
            lambda scale: paper_layers(
                self.shape,
                self.statistics.rho,
                visual_layers=visual,
                head_ratio=scale,
                neuron_ratio=scale,
                radius=PAPER_RADIUS,
                groups=self.groups,
                score=head_strategy.robust_score,
            )
        )

    def reader(self) -> Layers | None:
        """Frozen visual tokens; the layers that read most keep all heads."""
        count = self._affordable_readers()
        return self._read_in(select_readers(self.statistics.cross_modal, count))

    def reader_prefix(self) -> Layers | None:
        """Frozen visual tokens; the first layers keep all heads."""
        return self._read_in(list(range(self._affordable_readers())))

    def reader_heads(self) -> Layers | None:
        """Frozen visual tokens; all layers keep the heads with the largest effect."""
        scores = self.statistics.head_effect
        total = scores.numel()

        def build(scale: float) -> Layers:
            keep = head_strategy.select_top(scores, int(scale * total), groups=self.groups)
            return tuple(replace(self.reader_layer, read_heads=kept_heads(row)) for row in keep)

        return self.fill(self.scale(build))

    def attend(self) -> Layers | None:
        """All layers read; the first ones attend to their neighbors as well."""
        attending = replace(self.reader_layer, attend_heads=self._all_heads, radius=PAPER_RADIUS)
        return self._working(attending, lambda count: (self.reader_layer,) * count)

    def frozen_late(self) -> Layers | None:
        """The first layers complete, all others read."""
        whole = full_layer(self.shape)
        return self._working(whole, lambda count: (self.reader_layer,) * count)

    def frozen_early(self) -> Layers | None:
        """The last layers complete, all others read."""
        whole = full_layer(self.shape)
        return self._working(whole, lambda count: (self.reader_layer,) * count, at_end=True)

    def withdraw(self) -> Layers | None:
        """The first layers complete, one more reads their output, then nothing."""
        whole = full_layer(self.shape)
        return self._working(whole, lambda count: ((self.reader_layer,) + (EMPTY,) * count)[:count])

    def light(self) -> Layers | None:
        """Three quarters of the layers attend nearby."""
        return self._attending(round(0.75 * self.shape.layers))

    def thin(self) -> Layers | None:
        """All layers attend nearby."""
        return self._attending(self.shape.layers)

    def op_skip(self) -> Layers | None:
        """Whole operators of visual tokens, the first layers' first (see ``planning.op_skip``)."""
        return Policy.early(self.shape.layers, "none").layers(self)

    def _affordable_readers(self) -> int:
        by_flops = int(self.budget / self.cost((self.reader_layer,)) + 1e-9)
        by_kv = int(self.kv_budget / self.kv_share((self.reader_layer,)) + 1e-9)
        return min(self.shape.layers, by_flops, by_kv)

    def _read_in(self, readers: list[int]) -> Layers | None:
        total = self.shape.layers
        layers = tuple(self.reader_layer if index in readers else EMPTY for index in range(total))
        return self.fill(layers) if readers else None

    def _working(
        self, work: LayerPlan, rest: Callable[[int], Layers], *, at_end: bool = False
    ) -> Layers | None:
        """As many working layers as fit, the last to fit with only part of its neurons."""
        total = self.shape.layers

        def build(scale: float) -> Layers:
            whole, part = divmod(scale * total, 1)
            border = (replace(work, neurons=int(part * work.neurons)),) if part else ()
            idle = rest(total - int(whole) - len(border))
            if at_end:
                return idle + border + (work,) * int(whole)
            return (work,) * int(whole) + border + idle

        return self.fill(self.scale(build))

    def _attending(self, count: int) -> Layers | None:
        layer = replace(self.reader_layer, attend_heads=self._all_heads, radius=PAPER_RADIUS)
        return self.fill((layer,) * count + (EMPTY,) * (self.shape.layers - count))


TEMPLATES: dict[str, Callable[[TemplateBuilder], Layers | None]] = {
    "paper": TemplateBuilder.paper,
    "reader": TemplateBuilder.reader,
    "reader-heads": TemplateBuilder.reader_heads,
    "reader-prefix": TemplateBuilder.reader_prefix,
    "attend": TemplateBuilder.attend,
    "frozen-late": TemplateBuilder.frozen_late,
    "frozen-early": TemplateBuilder.frozen_early,
    "withdraw": TemplateBuilder.withdraw,
    "light": TemplateBuilder.light,
    "thin": TemplateBuilder.thin,
    OP_SKIP: TemplateBuilder.op_skip,
}

NEARBY = ("paper", "attend", "light", "thin")
"""Templates in which visual tokens attend to their neighbors."""


def trim(layers: Layers) -> Layers:
    """Drop what is never read: visual queries, FFNs and maps from the last reading layer on."""
    last = _last_reader(layers)
    return tuple(
        layer
        if index < last
        else replace(layer, attend_heads=(), radius=None, neurons=0, map_rank=0)
        for index, layer in enumerate(layers)
    )


def _last_reader(layers: Layers) -> int:
    return max((index for index, layer in enumerate(layers) if layer.read_heads), default=0)


def random_rho(statistics: Statistics, seed: int) -> Statistics:
    """The statistics with random head and neuron scores: the baseline of every selection."""
    generator = torch.Generator().manual_seed(seed)
    rho = torch.rand(statistics.rho.shape[1:], generator=generator)
    importance = torch.rand(statistics.neuron_square.shape, generator=generator).double()
    return replace(
        statistics,
        rho=rho[None],
        head_effect_sum=rho.double(),
        text_norm_sum=torch.ones_like(statistics.text_norm_sum),
        neuron_square=importance,
        down_norm=torch.ones_like(statistics.down_norm),
    )
