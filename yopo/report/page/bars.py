"""Horizontal bars with a name above and a value beside each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from yopo.report.page.svg import WIDTH, Svg, shorten

_ROW, _NAME, _GAP = 15.0, 17.0, 8.0
_END = 292.0
_LETTERS = 52


@dataclass(frozen=True)
class Bar:
    """A bar: its length between 0 and 1, its class, and what is written beside it."""

    share: float
    kind: str
    text: str


@dataclass(frozen=True)
class Group:
    """Bars under one name."""

    name: str
    bars: Sequence[Bar]
    is_marked: bool = False


def bars_chart(groups: Sequence[Group], label: str) -> Markup:
    """Draw groups of bars, one below the other.

    Args:
        groups: At least one, of at least one bar each.
        label: What they show.
    """
    height = sum(_NAME + _ROW * len(each.bars) + _GAP for each in groups)
    svg = Svg(height, label)
    y = 0.0
    for group in groups:
        name = f"{shorten(group.name, _LETTERS)}{' (worst)' if group.is_marked else ''}"
        svg.text(0, y + 12, name, "name marked" if group.is_marked else "name")
        y += _NAME
        for bar in group.bars:
            said = f"{group.name}: {bar.text}"
            svg.rect(0, y + 1, _END, _ROW - 3, "track")
            svg.rect(0, y + 1, min(max(bar.share, 0.0), 1.0) * _END, _ROW - 3, bar.kind, said)
            svg.text(WIDTH, y + _ROW - 3, bar.text, "value", "end")
            y += _ROW
        y += _GAP
    return svg.markup()
