"""Profile over depth as small bars: cross-modal attention, FFN neurons, locality."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from yopo.plans.schema import BEYOND_IMAGE, PruningPlan

LEVELS = "▁▂▃▄▅▆▇█"

_LABELS = ("cross-modal attention", "neurons for 90 %", "radius for 90 %")
_RANGE = 14
"""Characters of ``0.023 to 0.345``."""


class Profile:
    """A rich renderable of the per-layer measurements; adapts to the width."""

    def __init__(self, plan: PruningPlan):
        assert plan.measured is not None
        self.plan, self.measured = plan, plan.measured

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        measured = self.measured
        layers = self.plan.model.shape.layers
        label_width = max(map(len, _LABELS))
        room = max(options.max_width - label_width - _RANGE - 4, 1)
        per_bar = -(-layers // room)
        rows: tuple[tuple[Sequence[float], float, Callable[[float], str]], ...] = (
            (measured.cross_modal, max(measured.cross_modal), _decimal),
            (measured.concentration, 1.0, _decimal),
            (measured.locality, max(measured.locality), _radius),
        )
        table = Table.grid(padding=(0, 2))
        for label, (values, top, show) in zip(_LABELS, rows, strict=True):
            extent = f"{show(min(values))} to {show(max(values))}"
            bars = Text(sparkline(pooled(values, per_bar), top), "cyan")
            table.add_row(Text(label, "dim"), bars, Text(extent, "dim"))
        axis = f"layer 0 to {layers - 1}" + (f", {per_bar} per bar" if per_bar > 1 else "")
        yield Text(f"profile over depth ({axis})", "dim")
        yield table


def sparkline(values: Sequence[float], top: float) -> str:
    """One bar per value between 0 and ``top``."""
    if top <= 0:
        return LEVELS[0] * len(values)
    last = len(LEVELS) - 1
    return "".join(LEVELS[min(last, max(0, round(last * value / top)))] for value in values)


def pooled(values: Sequence[float], size: int) -> list[float]:
    """Means of ``size`` neighbors each (fewer at the end)."""
    groups = (values[start : start + size] for start in range(0, len(values), size))
    return [sum(group) / len(group) for group in groups]


def _radius(value: float) -> str:
    return "none" if value >= BEYOND_IMAGE else f"{value:g}"


def _decimal(value: float) -> str:
    return f"{value:.3f}"
