"""Head activity as a map of layers by heads, with what the plan keeps marked in it."""

from __future__ import annotations

from bisect import bisect_right

from markupsafe import Markup

from yopo.plans.schema import PruningPlan
from yopo.report import units
from yopo.report.page.depth import label_step, row_height
from yopo.report.page.svg import Svg

LEVELS = 7
"""Colors, at equal shares of all heads: rho spans orders of magnitude."""

_LEFT, _HEADS_END, _BAR_START, _BAR_END = 34.0, 296.0, 312.0, 392.0


def limits_of(plan: PruningPlan) -> list[float]:
    """Values of rho at which the color changes, ascending, ``LEVELS - 1`` of them."""
    assert plan.measured is not None
    ordered = sorted(value for row in plan.measured.rho for value in row)
    return [ordered[len(ordered) * part // LEVELS] for part in range(1, LEVELS)]


def heat_map(plan: PruningPlan) -> Markup:
    """The map. Kept heads fill their cells, dropped heads are small squares; a dot marks heads in
    which visual tokens attend. Bars beside it show the neurons that are kept."""
    assert plan.measured is not None
    shape, limits = plan.model.shape, limits_of(plan)
    height, width = row_height(shape.layers), (_HEADS_END - _LEFT) / shape.heads
    top = 34.0
    bottom = top + height * shape.layers
    svg = Svg(bottom + 6, "Head activity, kept heads and kept neurons of every layer", "chart heat")
    svg.text(_LEFT, 12, "query heads", "tick")
    svg.text(_BAR_START, 12, "neurons kept", "tick")
    every = max(1, round(8 * shape.heads / 32)) if shape.heads > 8 else 1
    for head in range(0, shape.heads, every):
        svg.text(_LEFT + (head + 0.5) * width, top - 6, str(head), "tick", "middle")
    step = label_step(height, shape.layers)
    for index, (rho, layer) in enumerate(zip(plan.measured.rho, plan.layers, strict=True)):
        y = top + index * height
        if index % step == 0:
            svg.text(_LEFT - 6, y + height / 2 + 4, str(index), "tick", "end")
        reads, attends = set(layer.read_heads), set(layer.attend_heads)
        for head, value in enumerate(rho):
            state = "attends" if head in attends else "read only" if head in reads else "dropped"
            said = f"layer {index}, head {head}: rho {value:.3g}, {state}"
            level = bisect_right(limits, value)
            _cell(svg, _LEFT + head * width, y, width, height, level, state, said)
        share = layer.neurons / shape.ffn
        svg.rect(_BAR_START, y + 1, _BAR_END - _BAR_START, height - 2, "track")
        said = f"layer {index}: {layer.neurons} of {shape.ffn} neurons, {units.share(share)}"
        svg.rect(_BAR_START, y + 1, share * (_BAR_END - _BAR_START), height - 2, "part-ffn", said)
    return svg.markup()


def _cell(
    svg: Svg, x: float, y: float, width: float, height: float, level: int, state: str, said: str
) -> None:
    middle = (x + width / 2, y + height / 2)
    if state == "dropped":
        side_x, side_y = 0.36 * width, 0.36 * height
        at = (middle[0] - side_x / 2, middle[1] - side_y / 2)
        svg.rect(x, y, width, height, "off", said)  # as large a target as the others
        svg.rect(*at, side_x, side_y, f"heat-{level} small")
        return
    gap = min(0.6, 0.06 * width)
    svg.rect(x + gap, y + gap, width - 2 * gap, height - 2 * gap, f"heat-{level}", said)
    if state == "attends":
        kind = "dot dark" if level < 4 else "dot light"
        svg.circle(*middle, min(width, height) * 0.16, kind)
