"""Charts over the depth of a decoder: FLOPs and cache per layer, and what calibration measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from yopo.plans.flops import (
    visual_flops_of_layer,
    visual_kv_bytes_of_layer,
    visual_parts_of_layer,
)
from yopo.plans.schema import PruningPlan, full_layer
from yopo.report import units
from yopo.report.page.svg import Scale, Svg

PARTS = (
    ("projections", "projections"),
    ("bottleneck", "bottleneck"),
    ("attention", "attention"),
    ("ffn", "FFN neurons"),
    ("map", "linear map"),
)
"""Parts of a layer's visual FLOPs: their names in code and in the legend."""

_LEFT = 34
_FLOPS_END, _KV_START, _KV_END = 262, 304, 392
_ROOM = 460
"""Height for all rows, as far as they stay legible."""


def row_height(layers: int) -> float:
    """Height of a layer's row: less of it the more layers there are."""
    return max(6.0, min(18.0, _ROOM / layers))


def label_step(height: float, layers: int) -> int:
    """Every how many rows there is room for a number."""
    step = math.ceil(13 / height)
    return step if step <= 2 or layers < 5 * step else 5 * math.ceil(step / 5)


def layers_chart(plan: PruningPlan) -> Markup:
    """Visual FLOPs of every layer by part, and its visual cache beside them.

    Both are relative to a layer of the dense model.
    """
    shape, workload = plan.model.shape, plan.seen
    whole = full_layer(shape)
    dense = visual_flops_of_layer(whole, shape, plan.workload)
    dense_kv = visual_kv_bytes_of_layer(whole, shape, plan.workload)
    shares = [
        {name: flops / dense for name, flops in vars(parts).items()}
        for parts in (visual_parts_of_layer(each, shape, workload) for each in plan.layers)
    ]
    stored = [visual_kv_bytes_of_layer(each, shape, workload) for each in plan.layers]
    height, top = row_height(shape.layers), 34.0
    svg = Svg(top + height * shape.layers + 6, "Visual FLOPs and cache of every layer")
    across = Scale(0.0, _ceiling(max(sum(each.values()) for each in shares)), _LEFT, _FLOPS_END)
    aside = Scale(0.0, _ceiling(max(stored) / dense_kv), _KV_START, _KV_END)
    bottom = top + height * shape.layers
    for scale, name in ((across, "visual FLOPs / dense"), (aside, "KV / dense")):
        svg.text(scale.start, 12, name, "tick")
        ticks = scale.ticks()
        for value in ticks if scale is across else (ticks[0], ticks[-1]):
            svg.line(scale(value), top - 4, scale(value), bottom, "grid")
            anchor = "end" if value == ticks[-1] and scale is aside else "middle"
            svg.text(scale(value), top - 8, f"{100 * value:.3g} %", "tick", anchor)
    step = label_step(height, shape.layers)
    for index, (parts, kv) in enumerate(zip(shares, stored, strict=True)):
        y = top + index * height
        if index % step == 0:
            svg.text(_LEFT - 6, y + height / 2 + 4, str(index), "tick", "end")
        _bars(svg, across, parts, y, height, index)
        said = f"layer {index}: {units.num_bytes(kv)} of visual KV, {units.share(kv / dense_kv)}"
        svg.rect(_KV_START, y + 1, max(aside(kv / dense_kv) - _KV_START, 0), height - 2, "kv", said)
    return svg.markup()


def _bars(
    svg: Svg, across: Scale, parts: dict[str, float], y: float, height: float, index: int
) -> None:
    start = 0.0
    for name, label in PARTS:
        share = parts[name]
        if share:
            said = f"layer {index}, {label}: {units.share(share)} of a dense layer"
            left, right = across(start), across(start + share)
            svg.rect(left, y + 1, right - left, height - 2, f"part-{name}", said)
        start += share


def _ceiling(value: float) -> float:
    """The end of an axis for shares up to ``value``."""
    return next((end for end in (0.1, 0.2, 0.4, 0.6, 0.8) if value <= end), max(1.0, value))


def depth_chart(values: Sequence[float | None], label: str, *, is_share: bool) -> Markup:
    """A line over the layers.

    Args:
        values: One per layer; None where there is none, at least one.
        label: What they are.
        is_share: Whether they lie between 0 and 1.
    """
    top, bottom, left, right = 22.0, 112.0, 40.0, 392.0
    svg = Svg(bottom + 34, f"{label} over depth")
    high = 1.0 if is_share else max(1, *(value for value in values if value is not None)) * 1.1
    up = Scale(0.0, high, bottom, top)
    for value in up.ticks():
        svg.line(left, up(value), right, up(value), "grid")
        svg.text(left - 6, up(value) + 4, f"{value:.3g}", "tick", "end")
    svg.text(left, 12, label, "tick")
    last = max(len(values) - 1, 1)
    across = Scale(0.0, float(last), left + 6, right - 6)
    svg.line(left, bottom, right, bottom, "axis")
    step = max(1, math.ceil(len(values) / 10))
    for index in range(0, len(values), step):
        svg.text(across(index), bottom + 15, str(index), "tick", "middle")
    svg.text((left + right) / 2, bottom + 30, "layer", "tick", "middle")
    known = [(index, value) for index, value in enumerate(values) if value is not None]
    svg.polyline([(across(index), up(value)) for index, value in known], "path pruned")
    radius = 3.5 if len(values) <= 40 else 2.0
    for index, value in known:
        svg.circle(across(index), up(value), radius, "pruned", f"layer {index}: {value:.3g}")
    return svg.markup()
