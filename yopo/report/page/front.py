"""The front: what plans lose at their budgets, the chosen one marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from yopo.report import units
from yopo.report.page.svg import WIDTH, Scale, Svg, decades

_LEFT, _RIGHT, _TOP = 56, 388, 14
_KL_HEIGHT, _RIGHT_HEIGHT, _GAP = 190, 110, 60


@dataclass(frozen=True)
class Point:
    """A plan on the front.

    Attributes:
        name: Its name in tooltips.
        budget: Its share of the visual FLOPs.
        kl: Logit KL per answer token in nats, if measured.
        right: Share of right answers of the dense and of the pruned model, if evaluated.
    """

    name: str
    budget: float
    kl: float | None
    right: tuple[float, float] | None = None


def front_chart(
    points: Sequence[Point], candidates: Sequence[Point], chosen: Point
) -> Markup | None:
    """Draw KL over budgets, and accuracy below it where plans were evaluated.

    Args:
        points: The report's plans.
        candidates: Plans that were measured and not chosen.
        chosen: The one of ``points`` to mark.

    Returns:
        The chart; None where no KL is known.
    """
    losses = [each.kl for each in (*points, *candidates) if _is_drawn(each.kl)]
    if not losses:
        return None
    judged = [each for each in points if each.right is not None]
    height = _TOP + _KL_HEIGHT + _GAP + (_RIGHT_HEIGHT + _GAP if judged else 0)
    svg = Svg(height, "Visual budget of plans against what they lose")
    widest = max(each.budget for each in (*points, *candidates))
    across = Scale(0.0, max(widest * 1.08, 0.01), _LEFT, _RIGHT)
    _kl_panel(svg, across, points, candidates, chosen)
    if judged:
        _accuracy_panel(svg, across, judged, chosen, _TOP + _KL_HEIGHT + _GAP)
    return svg.markup()


def _is_drawn(kl: float | None) -> bool:
    return kl is not None and math.isfinite(kl) and kl > 0


def _kl_panel(
    svg: Svg, across: Scale, points: Sequence[Point], candidates: Sequence[Point], chosen: Point
) -> None:
    bottom = _TOP + _KL_HEIGHT
    values = [each.kl for each in (*points, *candidates) if each.kl and _is_drawn(each.kl)]
    up = Scale(*decades(values), bottom, _TOP, is_log=True)
    for value in up.ticks():
        svg.line(_LEFT, up(value), _RIGHT, up(value), "grid")
        svg.text(_LEFT - 6, up(value) + 4, f"{value:g}", "tick", "end")
    _bottom_axis(svg, across, bottom)
    svg.text(_LEFT, _TOP - 4, "logit KL, nats per answer token", "tick")
    for each in candidates:
        if each.kl and _is_drawn(each.kl):
            svg.circle(across(each.budget), up(each.kl), 2.5, "rest", _said(each))
    shown = sorted((each for each in points if _is_drawn(each.kl)), key=lambda each: each.budget)
    svg.polyline([(across(each.budget), up(each.kl or 1.0)) for each in shown], "path pruned")
    for each in shown:
        _mark(svg, across(each.budget), up(each.kl or 1.0), each, chosen)


def _accuracy_panel(
    svg: Svg, across: Scale, judged: Sequence[Point], chosen: Point, top: float
) -> None:
    bottom = top + _RIGHT_HEIGHT
    shares = [share for each in judged for share in each.right or ()]
    low, high = min(shares), max(shares)
    room = max(0.05, 0.3 * (high - low))
    up = Scale(max(0.0, low - room), min(1.0, high + room), bottom, top)
    for value in up.ticks():
        svg.line(_LEFT, up(value), _RIGHT, up(value), "grid")
        svg.text(_LEFT - 6, up(value) + 4, f"{100 * value:.3g} %", "tick", "end")
    _bottom_axis(svg, across, bottom)
    svg.text(_LEFT, top - 4, "right answers; dashed: the dense model", "tick")
    ordered = sorted(judged, key=lambda each: each.budget)
    dense = [(across(each.budget), up(each.right[0])) for each in ordered if each.right]
    dense = [(_LEFT, dense[0][1]), *dense, (_RIGHT, dense[-1][1])]
    svg.polyline(dense, "path dense")
    ours = [(across(each.budget), up(each.right[1])) for each in ordered if each.right]
    svg.polyline(ours, "path pruned")
    for each, (x, y) in zip(ordered, ours, strict=True):
        _mark(svg, x, y, each, chosen)


def _bottom_axis(svg: Svg, across: Scale, bottom: float) -> None:
    svg.line(_LEFT, bottom, _RIGHT, bottom, "axis")
    for value in across.ticks():
        svg.text(across(value), bottom + 15, f"{100 * value:.3g} %", "tick", "middle")
    svg.text((_LEFT + WIDTH) / 2, bottom + 30, "of the visual FLOPs", "tick", "middle")


def _mark(svg: Svg, x: float, y: float, each: Point, chosen: Point) -> None:
    if each == chosen:
        svg.circle(x, y, 8, "ring")
    svg.circle(x, y, 4, "pruned", _said(each))


def _said(each: Point) -> str:
    parts = [f"{each.name}: {units.share(each.budget)} of the visual FLOPs"]
    parts += [] if each.kl is None else [f"logit KL {each.kl:.3g}"]
    if each.right is not None:
        parts.append(f"right answers {units.share(each.right[1])}")
    return ", ".join(parts)
