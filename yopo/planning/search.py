"""Better than a fixed shape: move work between layers as long as the measured KL falls.

What visual tokens compute (attention, FFN) is chosen layer by layer; what is left of the budget
buys heads that read, those first that do most with the image. So every state is a plan at the
budget, and a move - a layer starts or stops attending, widens or narrows its FFN - trades reading
heads against work. A sweep measures every move alone, then stacks the good ones, best first, each
kept only if the measured KL falls again (moves are not additive). Sweeps repeat until none helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from yopo import console
from yopo.plan import LayerPlan
from yopo.planning.paper import kept_heads
from yopo.planning.shapes import Layers, Shaper, trim
from yopo.strategies.heads import select_top
from yopo.strategies.neighbors import PAPER_RADIUS

WIDTHS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the FFN between which a move steps."""

MARGIN = 0.005
"""A move must lower the KL by this share: less is noise of the pairs that it is measured on."""

Measure = Callable[[Layers, str], float]
"""(layers, compensation) -> logit KL."""


@dataclass(frozen=True)
class Work:
    """What visual tokens compute in one layer, and whether its text may read them at all."""

    reads: bool
    attend: bool
    radius: int | None
    neurons: int


@dataclass(frozen=True)
class State:
    """A plan up to its reading heads, which the budget decides."""

    work: tuple[Work, ...]
    compensation: str

    def change(self, layer: int, **fields: object) -> State:
        """The state with one layer's work changed."""
        work = list(self.work)
        work[layer] = replace(work[layer], **fields)
        return replace(self, work=tuple(work))


def state_of(layers: Layers, compensation: str) -> State:
    """The work of a plan's layers."""
    work = tuple(
        Work(bool(layer.heads), layer.attend, layer.radius, layer.neurons) for layer in layers
    )
    return State(work, compensation)


def resolve(state: State, shaper: Shaper) -> Layers | None:
    """Buy reading heads with what the work leaves of the budget, then neurons with the rest.

    Heads under one KV head share its visual keys, so whole groups are bought.

    Returns:
        The layers; None if the work alone exceeds the budget, or nothing could be read.
    """
    shape, effect = shaper.shape, shaper.statistics.head_effect.clone()
    groups = max(shape.group, shaper.groups)
    readers = [index for index, work in enumerate(state.work) if work.reads]
    effect[[index for index, work in enumerate(state.work) if not work.reads]] = -1.0
    total = len(readers) * shape.heads

    def build(scale: float) -> Layers:
        keep = select_top(effect, int(scale * total), groups=groups)
        return tuple(
            LayerPlan(
                heads,
                attend=work.attend and bool(heads),
                radius=work.radius if work.attend and heads else None,
                neurons=work.neurons,
            )
            for heads, work in zip((kept_heads(row) for row in keep), state.work, strict=True)
        )

    layers = shaper.fill(shaper.scale(build))
    return layers if layers and any(layer.heads for layer in layers) else None


def moves(state: State, shaper: Shaper) -> Iterator[tuple[str, State]]:
    """Every single step away from a state, as (what changes, new state)."""
    full = shaper.shape.ffn
    for layer, work in enumerate(state.work):
        verb = "is not read" if work.reads else "is read"
        yield f"layer {layer} {verb}", state.change(layer, reads=not work.reads)
    for layer, work in enumerate(state.work[:-1]):  # nobody reads what the last layer makes
        if not work.attend:
            yield f"layer {layer} attends", state.change(layer, attend=True, radius=PAPER_RADIUS)
        else:
            yield f"layer {layer} does not attend", state.change(layer, attend=False, radius=None)
            other = PAPER_RADIUS if work.radius is None else None
            yield f"layer {layer} has radius {other}", state.change(layer, radius=other)
        levels = [round(share * full) for share in WIDTHS]
        wider = next((level for level in levels if level > work.neurons), None)
        narrower = next((level for level in reversed(levels) if level < work.neurons), None)
        for level in (wider, narrower):
            if level is not None:
                yield f"layer {layer} has {level} neurons", state.change(layer, neurons=level)
    other = "none" if state.compensation == "mean" else "mean"
    yield f"compensation {other}", replace(state, compensation=other)


class Search:
    """A local search from some plan at the shaper's budget.

    Args:
        shaper: Knows the model, the statistics and the budget.
        measure: Measures layers; called at most ``max_runs`` times.
        max_runs: Measured plans at most.

    Attributes:
        runs: Plans measured so far.
    """

    def __init__(self, shaper: Shaper, measure: Measure, max_runs: int):
        self.shaper, self.max_runs, self.runs = shaper, max_runs, 0
        self._measure = measure
        self._seen: dict[tuple[Layers, str], float] = {}

    def run(self, layers: Layers, compensation: str, kl: float) -> tuple[Layers, str, float]:
        """Search from a measured plan.

        Returns:
            (layers, compensation, kl) of the best plan found: the given one if nothing is better.
        """
        best = (trim(layers), compensation, kl)
        state = state_of(layers, compensation)
        own = self.measure(state)
        if own is not None and own[1] < kl:
            best = (own[0], compensation, own[1])
        current = best[2] if own is None else own[1]
        improved = True
        while improved and self.runs < self.max_runs:
            improved = False
            found = []
            for name, changed in moves(state, self.shaper):
                measured = self.measure(changed)
                if measured is not None and measured[1] < current * (1 - MARGIN):
                    found.append((measured[1], name))
            for _, name in sorted(found):
                changed = dict(moves(state, self.shaper)).get(name)
                measured = None if changed is None else self.measure(changed)
                if measured is None or measured[1] >= current * (1 - MARGIN):
                    continue
                state, current, improved = changed, measured[1], True
                console.note(f"search: {name}, logit KL {current:.3g} ({self.runs} runs)")
                if current < best[2]:
                    best = (measured[0], changed.compensation, current)
        return best

    def measure(self, state: State) -> tuple[Layers, float] | None:
        """Resolve and measure a state; None if it does not fit or the runs are used up."""
        layers = resolve(state, self.shaper)
        if layers is None:
            return None
        key = (layers, state.compensation)
        if key not in self._seen:
            if self.runs >= self.max_runs:
                return None
            self.runs += 1
            self._seen[key] = self._measure(layers, state.compensation)
        return layers, self._seen[key]
