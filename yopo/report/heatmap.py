"""Head activity rho as a map of layers by heads, one character per head, kept heads marked.

Kept heads are blocks, dropped heads are points; both grow with rho in four steps, so that the map
is readable without color, as in a pipe.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from yopo.plans.schema import PruningPlan

KEPT = "░▒▓█"
DROPPED = ".:+*"

_COLORS = ("color(24)", "color(31)", "color(43)", "color(227)")
_LABEL = "layer "
_TICK = 8


@dataclass(frozen=True)
class Cell:
    """One character of the map: a head, or the most active of a few neighbors."""

    rho: float
    is_kept: bool


class Heatmap:
    """A rich renderable of a plan's ``measured.rho``; adapts to the console's width."""

    def __init__(self, plan: PruningPlan):
        assert plan.measured is not None
        self.plan, self.rho = plan, plan.measured.rho
        self.limits = _quartiles([value for row in self.rho for value in row])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heads = self.plan.model.shape.heads
        room = max(options.max_width - len(_LABEL) - 1, 1)
        per_cell = -(-heads // room)
        yield Text("head activity rho: how much the text looks at the image", "dim")
        yield from self._axis(heads, per_cell)
        for index, row in enumerate(self._cells(per_cell)):
            line = Text(f"{index:>{len(_LABEL) - 1}} ", "dim")
            for cell in row:
                line.append(*self._glyph(cell))
            yield line
        yield from self._legend(per_cell)

    def _cells(self, per_cell: int) -> Iterator[list[Cell]]:
        heads = self.plan.model.shape.heads
        for rho, layer in zip(self.rho, self.plan.layers, strict=True):
            kept = set(layer.read_heads)
            yield [
                Cell(max(rho[start : start + per_cell]), not kept.isdisjoint(members))
                for start in range(0, heads, per_cell)
                for members in [range(start, min(start + per_cell, heads))]
            ]

    def _glyph(self, cell: Cell) -> tuple[str, str]:
        level = bisect_right(self.limits, cell.rho)
        return (KEPT[level], _COLORS[level]) if cell.is_kept else (DROPPED[level], "bright_black")

    def _axis(self, heads: int, per_cell: int) -> Iterator[Text]:
        ticks = range(0, -(-heads // per_cell), _TICK)
        names = [str(tick * per_cell) if tick else "head 0" for tick in ticks]
        yield Text(_LABEL + "".join(f"{name:<{_TICK}}" for name in names).rstrip(), "dim")

    def _legend(self, per_cell: int) -> Iterator[Text]:
        low, middle, high = (f"{limit:.2g}" for limit in self.limits)
        line = Text("kept ", "dim")
        for glyph, color in zip(KEPT, _COLORS, strict=True):
            line.append(glyph, color)
        line.append(f"  dropped {DROPPED}  rho steps at {low}, {middle}, {high}", "dim")
        yield line
        if per_cell > 1:
            yield Text(f"(one character is {per_cell} heads: the most active of them)", "dim")


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    # Steps at quartiles, since rho spans orders of magnitude: equal steps would show one head.
    ordered = sorted(values)
    low, middle, high = (ordered[len(ordered) * part // 4] for part in (1, 2, 3))
    return low, middle, high
