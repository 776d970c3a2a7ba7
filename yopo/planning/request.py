"""What a user may ask of a plan, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass

from yopo.plans.schema import COMPENSATIONS, ModelShape
from yopo.strategies.neighbors import PAPER_RADIUS
from yopo.support.errors import PlanError, suggest

PRESETS: dict[str, dict[str, float]] = {
    "yopo-25": {"head_ratio": 0.5, "neuron_ratio": 0.5},
    "yopo-12": {"head_ratio": 0.25, "neuron_ratio": 0.25},
}
"""The paper's two shapes: half the layers, a half (a quarter) of the heads and neurons."""


@dataclass(frozen=True)
class Wishes:
    """What the plan should look like. Either a budget, or the paper's shape with its knobs.

    Attributes:
        budget: Visual budget to solve for, in (0, 1].
        milliseconds: Instead of a budget: prefill time of the workload's prompt, by a cost table.
        tolerance: Instead of a budget: take the smallest one whose agreement with the dense model
            stays within this, on pairs set aside.
        preset: Name in ``PRESETS``; explicit knobs override its values.
        head_ratio: Share of the query heads of visual layers that are kept.
        neuron_ratio: Share of the FFN neurons of visual layers that are kept.
        visual_layers: Number of first layers that see visual tokens; None: half of them under a
            preset, else all.
        radius: Chebyshev radius of visual attention; None: 2 under a preset, else no limit.
        alpha: Select heads by the authors' vote at this activity, not by ratio.
        compensation: ``none``, ``mean`` or ``refit``; None: the paper's shape has none, a budget
            measures.
        bidirectional: Whether visual tokens attend neighbors behind them (fine-tuned models).
        shape: Name of the candidate shape to scale to the budget; None: the best is measured.
        search: Measure at most so many more plans to improve the best shape layer by layer;
            None: do not.
        kv_groups: Whether the query heads of one KV head are kept or dropped together: then every
            dropped head shrinks the KV cache. Single query heads are a finer choice.
        kv_budget: Beside a budget: share of the dense model's visual KV bytes that is allowed, in
            (0, 1].

    Raises:
        PlanError: A value is out of range, or two exclude one another.
    """

    budget: float | None = None
    preset: str | None = None
    head_ratio: float | None = None
    neuron_ratio: float | None = None
    visual_layers: int | None = None
    radius: int | None = None
    alpha: float | None = None
    compensation: str | None = None
    bidirectional: bool = False
    shape: str | None = None
    search: int | None = None
    kv_groups: bool = False
    tolerance: float | None = None
    milliseconds: float | None = None
    kv_budget: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise PlanError(f"budget must lie in (0, 1], found {self.budget}.")
        if self.tolerance is not None:
            self._check_tolerance()
        if self.preset is not None and self.preset not in PRESETS:
            raise PlanError(
                f"Unknown preset '{self.preset}'.", remedy=suggest(self.preset, PRESETS)
            )
        for name in ("head_ratio", "neuron_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise PlanError(f"{name} must lie in [0, 1], found {value}.")
        if self.compensation is not None and self.compensation not in COMPENSATIONS:
            known = ", ".join(COMPENSATIONS)
            raise PlanError(f"compensation must be one of {known}; found '{self.compensation}'.")
        for name in ("radius", "visual_layers"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise PlanError(f"{name} must be at least 0, found {value}.")
        if self.alpha is not None and self.alpha < 0:
            raise PlanError(f"alpha must be at least 0, found {self.alpha}.")
        if self.alpha is not None and self.head_ratio is not None:
            raise PlanError("head_ratio and alpha exclude one another: both select heads.")
        if self.milliseconds is not None:
            self._check_milliseconds()
        if self.kv_budget is not None:
            self._check_kv_budget()
        for name in ("shape", "search"):
            if getattr(self, name) and self.budget is None and self.milliseconds is None:
                raise PlanError(f"{name} needs a budget to keep to.")
        knobs = [name for name in _SHAPE_KNOBS if getattr(self, name) is not None]
        if self.budget is not None and knobs:
            raise PlanError(
                f"budget and {knobs[0]} exclude one another.",
                remedy="Ask for a budget and let it be solved, or give the shape yourself.",
            )

    def _check_milliseconds(self) -> None:
        if not self.milliseconds > 0:
            raise PlanError(f"milliseconds must be positive, found {self.milliseconds}.")
        for name in ("budget", "tolerance", *_SHAPE_KNOBS):
            if getattr(self, name) is not None:
                raise PlanError(f"milliseconds and {name} exclude one another.")

    def _check_kv_budget(self) -> None:
        if not 0 < self.kv_budget <= 1:
            raise PlanError(f"kv_budget must lie in (0, 1], found {self.kv_budget}.")
        if self.budget is None and self.tolerance is None and self.milliseconds is None:
            raise PlanError(
                "kv_budget stands beside a budget, and there is none.",
                remedy="A shape of your own decides what is cached: give --budget instead.",
            )

    def _check_tolerance(self) -> None:
        if not 0 < self.tolerance < 1:
            raise PlanError(f"tolerance must lie in (0, 1), found {self.tolerance}.")
        for name in ("budget", "shape", "search", *_SHAPE_KNOBS):
            if getattr(self, name) is not None:
                raise PlanError(
                    f"tolerance and {name} exclude one another.",
                    remedy="A tolerance finds the budget, and allocates it.",
                )
        if self.compensation not in (None, "refit"):
            raise PlanError("A tolerance is met with fitted weights: compensation must be refit.")

    @property
    def asks_for_shape(self) -> bool:
        """Whether anything but the defaults describes the paper's shape."""
        return any(getattr(self, name) is not None for name in _SHAPE_KNOBS)

    def knob(self, name: str) -> float:
        """An explicit ratio, else the preset's, else 1 (keep all)."""
        explicit = getattr(self, name)
        if explicit is not None:
            return explicit
        return PRESETS[self.preset][name] if self.preset else 1.0

    def num_visual_layers(self, shape: ModelShape) -> int:
        """Visual layers asked for, at most all.

        Raises:
            PlanError: More than the model has.
        """
        if self.visual_layers is None:
            return shape.layers // 2 if self.preset else shape.layers
        if self.visual_layers > shape.layers:
            raise PlanError(
                f"visual_layers is {self.visual_layers}, the model has {shape.layers} layers."
            )
        return self.visual_layers

    def groups(self, shape: ModelShape) -> int:
        """Query heads of a model that are kept or dropped together."""
        return shape.group if self.kv_groups else 1

    @property
    def radius_or_default(self) -> int | None:
        """The radius asked for; the paper's under a preset; else no limit."""
        if self.radius is not None:
            return self.radius
        return PAPER_RADIUS if self.preset else None


_SHAPE_KNOBS = ("preset", "head_ratio", "neuron_ratio", "visual_layers", "radius", "alpha")
