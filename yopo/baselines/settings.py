"""What each rival does at a visual budget, as numbers, and what that costs in closed form.

Three of the rivals are the same thing to ``flops.py``: a number of visual tokens per decoder layer,
each of which does everything there. The masked simulation computes what the dense model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_flops,
    dense_visual_kv_bytes,
    visual_budget,
)
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, PruningPlan, Workload
from yopo.support.errors import PlanError, suggest

SIMULATED = "masked"
NAMES = ("vtw", "fastv", "downsample", SIMULATED)

FASTV_LAYERS = 2
"""Layers in front of FastV's drop (its K), of which the last one's attention ranks the tokens."""

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Setting:
    """A rival and its parameter.

    Attributes:
        name: One of ``NAMES``.
        layers: Decoder layers in front of the drop (K); all of them where nothing is dropped.
        share: Of the visual tokens, kept behind the drop (R); vtw keeps none.
        scale: Rows and columns of every image's grid, over the original ones.
    """

    name: str
    layers: int
    share: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)

    def kept(self, visual: int) -> int:
        """How many of a prompt's visual tokens go on behind the drop."""
        return int(self.share * visual + _ROUNDING)

    def grid(self, grid: Grid) -> Grid:
        """What an image's grid becomes in front of the first layer."""
        rows, cols = self.scale
        return Grid(
            max(1, int(grid.rows * rows + _ROUNDING)), max(1, int(grid.cols * cols + _ROUNDING))
        )

    def tokens(self, shape: ModelShape, grids: Sequence[Grid]) -> tuple[int, ...]:
        """Visual tokens of one prompt in every layer."""
        start = sum(self.grid(grid).tokens for grid in grids)
        front = min(self.layers, shape.layers)
        return (start,) * front + (self.kept(start),) * (shape.layers - front)

    def on_layers(self, used: Sequence[int]) -> Setting:
        """The same on a model that has some of the layers; a drop by rank keeps one to rank in."""
        front = sum(index < self.layers for index in used)
        return replace(self, layers=max(front, 1) if self.name == "fastv" else front)

    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """The parameter, as papers write it."""
        if self.name == "vtw":
            return f"K = {self.layers} of {shape.layers} layers"
        if self.name == "fastv":
            return f"K = {self.layers} of {shape.layers} layers, R = {100 * self.share:.1f} %"
        if self.name == "downsample":
            sizes = dict.fromkeys(workload.grids)
            pairs = ((each, self.grid(each)) for each in sizes)
            return ", ".join(
                f"{old.rows}x{old.cols} to {new.rows}x{new.cols}" for old, new in pairs
            )
        return "the plan as masks, nothing is skipped"


def solve(name: str, shape: ModelShape, workload: Workload, budget: float) -> Setting:
    """The setting that comes closest to a visual budget from below.

    Args:
        name: One of ``NAMES``; ``masked`` has no budget of its own.
        shape: The decoder.
        workload: The prompt that the budget is solved for.
        budget: Visual FLOPs over the dense model's, in (0, 1].

    Raises:
        PlanError: No such rival, or its least is above the budget.
    """
    if name not in NAMES:
        raise PlanError(f"Unknown rival '{name}'.", remedy=suggest(name, NAMES))
    if not 0 < budget <= 1:
        raise PlanError(f"A visual budget lies in (0, 1], found {budget:g}.")
    if name == SIMULATED:
        return Setting(name, shape.layers)
    fitting = [
        each for each in _choices(name, shape, workload) if _fits(each, shape, workload, budget)
    ]
    if not fitting:
        least = min(reached(each, shape, workload) for each in _choices(name, shape, workload))
        raise PlanError(
            f"{name} needs at least {100 * least:.1f} % of the visual FLOPs on {shape.layers} "
            f"layers, above the budget of {100 * budget:.1f} %.",
            remedy="Compare at a larger budget, or leave this rival out.",
        )
    return max(fitting, key=lambda each: reached(each, shape, workload))


def solve_for(name: str, plan: PruningPlan, budget: float | None = None) -> Setting:
    """The setting at a plan's visual budget (or another one) on its own prompt."""
    asked = visual_budget(plan) if budget is None else budget
    return solve(name, plan.model.shape, plan.workload, asked)


def _choices(name: str, shape: ModelShape, workload: Workload) -> list[Setting]:
    if name == "vtw":
        return [Setting(name, layers) for layers in range(shape.layers + 1)]
    if name == "fastv":
        visual, front = max(workload.visual, 1), min(FASTV_LAYERS, shape.layers)
        return [Setting(name, front, count / visual) for count in range(visual + 1)]
    steps = sorted(
        {
            k / side
            for grid in workload.grids
            for side in (grid.rows, grid.cols)
            for k in range(1, side + 1)
        }
    )
    pairs = [*zip(steps, steps, strict=True), *zip(steps, steps[1:], strict=False)]
    return [Setting(name, shape.layers, scale=pair) for pair in pairs]


def _fits(each: Setting, shape: ModelShape, workload: Workload, budget: float) -> bool:
    return reached(each, shape, workload) <= budget * (1 + _ROUNDING)


def visual_flops(setting: Setting, shape: ModelShape, workload: Workload) -> int:
    """Visual FLOPs that the rival computes for one prompt, in the paper's convention.

    What only ranks tokens (one row of attention) is not counted, as the papers do not.
    """
    return sum(
        dense_visual_flops(*_layer(shape, workload, count))
        for count in setting.tokens(shape, workload.grids)
    )


def reached(setting: Setting, shape: ModelShape, workload: Workload) -> float:
    """The rival's visual FLOPs over the dense model's."""
    return visual_flops(setting, shape, workload) / dense_visual_flops(shape, workload)


def prefill_flops(setting: Setting, shape: ModelShape, workload: Workload) -> int:
    """Matrix-product FLOPs that the rival executes to prefill one prompt, text included."""
    total = sum(
        dense_prefill_flops(*_layer(shape, workload, count))
        for count in setting.tokens(shape, workload.grids)
    )
    if setting.name == "fastv" and setting.layers < shape.layers:
        # One more query projection and one row of logits.
        keys = shape.hidden + workload.visual + workload.text
        total += 2 * keys * shape.heads * shape.head_dim
    return total


def visual_kv_bytes(
    setting: Setting, shape: ModelShape, workload: Workload, itemsize: int = 2
) -> int:
    """Bytes of visual keys and values in the rival's cache for one prompt."""
    return sum(
        dense_visual_kv_bytes(*_layer(shape, workload, count), itemsize)
        for count in setting.tokens(shape, workload.grids)
    )


def _layer(shape: ModelShape, workload: Workload, visual: int) -> tuple[ModelShape, Workload]:
    """One dense layer, and a prompt of so many visual tokens."""
    grids = (Grid(1, visual),) if visual else ()
    return replace(shape, layers=1), Workload(grids, workload.text, workload.text_before)
