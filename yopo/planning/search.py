"""Local search beyond fixed shapes: move work between layers as long as the measured KL falls.

The work of visual tokens (attention, FFN) is chosen layer by layer; the rest of the budget buys
reading heads, those with the largest effect first. So every state is a plan at the budget, and a
move - a layer starts or stops attending, widens or narrows its FFN - trades reading heads for work.
A sweep measures every move separately, then combines the good ones, best first, each kept only if
the measured KL falls again (moves are not additive). Sweeps repeat until none helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from yopo.planning.paper import kept_heads
from yopo.planning.templates import Layers, TemplateBuilder
from yopo.plans.schema import LayerPlan
from yopo.strategies.heads import select_top
from yopo.strategies.neighbors import PAPER_RADIUS
from yopo.support import console

WIDTHS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the FFN between which a move steps."""

MARGIN = 0.005
"""A move must lower the KL by this share; anything less is measurement noise."""

Resolved = tuple[Layers, str]
"""Layers and compensation."""

Measure = Callable[[Layers, str], float]
"""(layers, compensation) -> logit KL."""

S = TypeVar("S")


@dataclass(frozen=True)
class Work:
    """The work of visual tokens in one layer, and whether its text may read them."""

    reads: bool
    attend: bool
    radius: int | None
    neurons: int


@dataclass(frozen=True)
class State:
    """A plan without its reading heads, which the budget determines."""

    work: tuple[Work, ...]
    compensation: str

    def change(self, layer: int, work: Work) -> State:
        """The state with one layer's work replaced."""
        return replace(self, work=(*self.work[:layer], work, *self.work[layer + 1 :]))

    def layers(self, builder: TemplateBuilder) -> Layers | None:
        """Its layers at a budget; see :func:`resolve`."""
        found = resolve(self, builder)
        return None if found is None else found[0]


def state_of(layers: Layers, compensation: str) -> State:
    """The work of a plan's layers."""
    work = tuple(
        Work(bool(layer.read_heads), bool(layer.attend_heads), layer.radius, layer.neurons)
        for layer in layers
    )
    return State(work, compensation)


def resolve(state: State, builder: TemplateBuilder) -> Resolved | None:
    """Spend the budget that the work leaves on reading heads, then on neurons.

    Heads under one KV head share its visual keys, so whole groups are bought.

    Returns:
        The layers and the state's compensation; None if the work alone exceeds the budget or no
        head could read.
    """
    shape, effect = builder.shape, builder.statistics.head_effect.clone()
    groups = max(shape.group, builder.groups)
    readers = [index for index, work in enumerate(state.work) if work.reads]
    effect[[index for index, work in enumerate(state.work) if not work.reads]] = -1.0
    total = len(readers) * shape.heads

    def build(scale: float) -> Layers:
        keep = select_top(effect, int(scale * total), groups=groups)
        return tuple(
            LayerPlan(
                heads,
                attend_heads=heads if work.attend else (),
                radius=work.radius if work.attend and heads else None,
                neurons=work.neurons,
            )
            for heads, work in zip((kept_heads(row) for row in keep), state.work, strict=True)
        )

    layers = builder.fill(builder.scale(build))
    if layers is None or not any(layer.read_heads for layer in layers):
        return None
    return layers, state.compensation


def moves(state: State, builder: TemplateBuilder) -> Iterator[tuple[str, State]]:
    """Every single step away from a state, as (what changes, new state)."""
    full = builder.shape.ffn
    has_neighbors = builder.statistics.reduction is None
    for layer, work in enumerate(state.work):
        verb = "is not read" if work.reads else "is read"
        yield f"layer {layer} {verb}", state.change(layer, replace(work, reads=not work.reads))
    for layer, work in enumerate(state.work[:-1]):  # no layer reads the last one's output
        if not work.attend:
            radius = PAPER_RADIUS if has_neighbors else None
            attending = replace(work, attend=True, radius=radius)
            yield f"layer {layer} attends", state.change(layer, attending)
        else:
            idle = replace(work, attend=False, radius=None)
            yield f"layer {layer} does not attend", state.change(layer, idle)
        if work.attend and has_neighbors:
            radius = PAPER_RADIUS if work.radius is None else None
            moved = replace(work, radius=radius)
            yield f"layer {layer} has radius {radius}", state.change(layer, moved)
        levels = [round(share * full) for share in WIDTHS]
        wider = next((level for level in levels if level > work.neurons), None)
        narrower = next((level for level in reversed(levels) if level < work.neurons), None)
        for level in (wider, narrower):
            if level is not None:
                changed = replace(work, neurons=level)
                yield f"layer {layer} has {level} neurons", state.change(layer, changed)
    other = "none" if state.compensation == "mean" else "mean"
    yield f"compensation {other}", replace(state, compensation=other)


class Search(Generic[S]):
    """A local search over states that resolve to plans at a budget.

    Args:
        moves: Every single step away from a state, as (what changes, new state).
        resolve: The layers and compensation of a state; None if it does not fit the budget.
        measure: Measures the KL; called at most ``max_runs`` times, never twice for the same plan.
        max_runs: Maximum number of measured plans.
        known: Earlier measurements.

    Attributes:
        runs: Plans measured so far.
    """

    def __init__(
        self,
        moves: Callable[[S], Iterator[tuple[str, S]]],
        resolve: Callable[[S], Resolved | None],
        measure: Measure,
        max_runs: int,
        known: Mapping[Resolved, float] | None = None,
    ):
        self.max_runs, self.runs = max_runs, 0
        self._moves, self._resolve, self._measure = moves, resolve, measure
        self._seen: dict[Resolved, float] = dict(known or {})

    def run(self, state: S, found: Resolved, kl: float) -> tuple[Resolved, float]:
        """Search from a state.

        Args:
            state: Where to start.
            found: The best layers and compensation so far: the state's own, or near them.
            kl: KL measured for ``found``.

        Returns:
            ((layers, compensation), kl) of the best plan: the given one if nothing is better.
        """
        best = (found, kl)
        own = self.measure(state)
        if own is not None and own[1] < kl:
            best = own
        current = kl if own is None else own[1]
        improved = True
        while improved and self.runs < self.max_runs:
            improved = False
            good = []
            for name, changed in self._moves(state):
                measured = self.measure(changed)
                if measured is not None and measured[1] < current * (1 - MARGIN):
                    good.append((measured[1], name))
            for _, name in sorted(good):
                again = dict(self._moves(state)).get(name)
                if again is None:
                    continue
                measured = self.measure(again)
                if measured is None or measured[1] >= current * (1 - MARGIN):
                    continue
                state, current, improved = again, measured[1], True
                console.note(f"search: {name}, logit KL {current:.3g} ({self.runs} runs)")
                if current < best[1]:
                    best = measured
        return best

    def measure(self, state: S) -> tuple[Resolved, float] | None:
        """Resolve and measure a state; None if it does not fit or the runs are used up."""
        resolved = self._resolve(state)
        if resolved is None:
            return None
        if resolved not in self._seen:
            if self.runs >= self.max_runs:
                return None
            self.runs += 1
            self._seen[resolved] = self._measure(*resolved)
        return resolved, self._seen[resolved]
