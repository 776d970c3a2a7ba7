"""Requests for a plan: a visual budget, the paper's shape, a tolerance, or a time.

Each has its own type, so that conflicting options cannot be combined; each validates its values on
construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from yopo.plans.schema import COMPENSATIONS, ModelShape
from yopo.strategies.neighbors import PAPER_RADIUS
from yopo.support.errors import PlanError, suggest

PRESETS: dict[str, dict[str, float]] = {
    "yopo-25": {"head_ratio": 0.5, "neuron_ratio": 0.5},
    "yopo-12": {"head_ratio": 0.25, "neuron_ratio": 0.25},
}
"""The paper's two shapes: half the layers, half (a quarter) of the heads and neurons."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options common to all requests.

    Attributes:
        compensation: ``none``, ``mean`` or ``refit``; None: the request's default.
        bidirectional: Whether visual tokens also attend to later neighbors (fine-tuned models).
        kv_groups: Whether the query heads of one KV head are kept or dropped together, so that
            every dropped head shrinks the KV cache. Single query heads are a finer choice.
        engine: The inference engine that has to be able to run the plan (``vllm``); None: any plan.
    """

    compensation: str | None = None
    bidirectional: bool = False
    kv_groups: bool = False
    engine: str | None = None

    def __post_init__(self) -> None:
        if self.compensation is not None and self.compensation not in COMPENSATIONS:
            known = ", ".join(COMPENSATIONS)
            raise PlanError(f"compensation must be one of {known}; found '{self.compensation}'.")
        _check_engine(self.engine, bidirectional=self.bidirectional)

    def group(self, shape: ModelShape) -> int:
        """Number of query heads of a model that are kept or dropped together."""
        return shape.group if self.kv_groups else 1

    def provenance(self) -> dict[str, object]:
        """Entries of a plan's provenance for the request, without defaults."""
        given = {"kv_groups": self.kv_groups or None, "engine": self.engine}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class _Budgeted(Options):
    """Options of a request that ends in a visual budget.

    Attributes:
        kv_budget: Allowed share of the dense model's visual KV bytes, in (0, 1]; None: all.
        template: Name of the plan template to scale to the budget; None: the best is measured.
        search: Measure at most this many additional plans to improve the best one;
            None: do not search.
    """

    kv_budget: float | None = None
    template: str | None = None
    search: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("kv_budget", self.kv_budget)
        _check_kv(self)

    def provenance(self) -> dict[str, object]:
        """Entries of the common options and the KV budget."""
        kv = {} if self.kv_budget is None else {"kv_budget": self.kv_budget}
        return kv | super().provenance()

    def at(self, budget: float) -> BudgetRequest:
        """The request with a visual budget and the same options."""
        names = [each.name for each in fields(_Budgeted)]
        return BudgetRequest(budget, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class BudgetRequest(_Budgeted):
    """The best plan within a share of the visual FLOPs.

    Attributes:
        budget: Visual FLOPs over the dense model's, in (0, 1].

    Raises:
        PlanError: A value is out of range.
    """

    budget: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("budget", self.budget)


@dataclass(frozen=True)
class LatencyRequest(_Budgeted):
    """The best plan within a prefill time, for the calibration's typical prompt.

    Attributes:
        milliseconds: The time.
        costs: File with the output of ``yopo bench --json`` on this machine.

    Raises:
        PlanError: A value is out of range.
    """

    milliseconds: float
    costs: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.milliseconds > 0:
            raise PlanError(f"milliseconds must be positive, found {self.milliseconds}.")


TOLERANCE_ON = ("tokens", "answers")
"""What a tolerance may be a share of."""


@dataclass(frozen=True)
class ToleranceRequest(Options):
    """The plan of the smallest budget that agrees with the dense model within a tolerance.

    Attributes:
        tolerance: Share that may be predicted differently, on held-out pairs.
        kv_budget: As for a budget.
        tolerance_on: Of what it is a share: ``tokens`` of the dense model's answers, or whole
            ``answers``, which differ if any token does.

    Raises:
        PlanError: A value is out of range.
    """

    tolerance: float
    kv_budget: float | None = None
    tolerance_on: str = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tolerance < 1:
            raise PlanError(f"tolerance must lie in (0, 1), found {self.tolerance}.")
        _check_share("kv_budget", self.kv_budget)
        _check_kv(self)
        if self.tolerance_on not in TOLERANCE_ON:
            raise PlanError(
                f"tolerance_on must be one of {', '.join(TOLERANCE_ON)}, found "
                f"'{self.tolerance_on}'.",
                remedy=suggest(self.tolerance_on, TOLERANCE_ON),
            )
        if self.compensation not in (None, "refit"):
            raise PlanError("A tolerance is met with fitted weights: compensation must be refit.")

    def at(self, budget: float) -> BudgetRequest:
        """The request to try one budget."""
        return BudgetRequest(
            budget,
            kv_budget=self.kv_budget,
            compensation=self.compensation,
            bidirectional=self.bidirectional,
            kv_groups=self.kv_groups,
            engine=self.engine,
        )


@dataclass(frozen=True, kw_only=True)
class PaperRequest(Options):
    """The paper's shape: a cut, a share of the heads and neurons, a neighborhood.

    Attributes:
        preset: Name in ``PRESETS``; explicit values override it.
        head_ratio: Share of the query heads of visual layers that are kept.
        neuron_ratio: Share of the FFN neurons of visual layers that are kept.
        visual_layers: Number of first layers that see visual tokens; None: half of them under a
            preset, else all.
        radius: Chebyshev radius of visual attention; None: 2 under a preset, else no limit.
        alpha: Select heads by the authors' vote at this activity, not by ratio.

    Raises:
        PlanError: A value is out of range, or two are mutually exclusive.
    """

    preset: str | None = None
    head_ratio: float | None = None
    neuron_ratio: float | None = None
    visual_layers: int | None = None
    radius: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is not None and self.preset not in PRESETS:
            raise PlanError(
                f"Unknown preset '{self.preset}'.", remedy=suggest(self.preset, PRESETS)
            )
        for name in ("head_ratio", "neuron_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise PlanError(f"{name} must lie in [0, 1], found {value}.")
        for name in ("radius", "visual_layers", "alpha"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise PlanError(f"{name} must be at least 0, found {value}.")
        if self.alpha is not None and self.head_ratio is not None:
            raise PlanError("head_ratio and alpha exclude one another: both select heads.")

    def provenance(self) -> dict[str, object]:
        """Entries of the common options, the preset and the explicit values."""
        values = {name: getattr(self, name) for name in KNOBS}
        return {name: value for name, value in values.items() if value is not None} | (
            super().provenance()
        )

    def ratio(self, name: str) -> float:
        """An explicit ratio, else the preset's, else 1 (keep all)."""
        explicit = getattr(self, name)
        if explicit is not None:
            return explicit
        return PRESETS[self.preset][name] if self.preset else 1.0

    def num_visual_layers(self, shape: ModelShape) -> int:
        """The requested number of visual layers.

        Raises:
            PlanError: It is more than the model has.
        """
        if self.visual_layers is None:
            return shape.layers // 2 if self.preset else shape.layers
        if self.visual_layers > shape.layers:
            raise PlanError(
                f"visual_layers is {self.visual_layers}, the model has {shape.layers} layers."
            )
        return self.visual_layers

    @property
    def radius_or_default(self) -> int | None:
        """The requested radius; otherwise the paper's under a preset; otherwise no limit."""
        if self.radius is not None:
            return self.radius
        return PAPER_RADIUS if self.preset else None


KNOBS = ("preset", "head_ratio", "neuron_ratio", "visual_layers", "radius", "alpha")
"""Attributes of a :class:`PaperRequest` that describe the shape."""

PlanRequest = BudgetRequest | PaperRequest | ToleranceRequest | LatencyRequest
"""Any request."""


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise PlanError(f"{name} must lie in (0, 1], found {value}.")


ENGINES = ("vllm",)
"""Inference engines that plans can be made for."""


def _check_engine(engine: str | None, *, bidirectional: bool) -> None:
    if engine is not None and engine not in ENGINES:
        raise PlanError(
            f"Unknown engine '{engine}', expected {' or '.join(ENGINES)}.",
            remedy=suggest(engine, ENGINES),
        )
    if engine is not None and bidirectional:
        raise PlanError(
            f"engine and bidirectional exclude one another: attention in {engine} is causal."
        )


def _check_kv(request: _Budgeted | ToleranceRequest) -> None:
    if request.engine is not None and request.kv_budget is not None:
        raise PlanError(
            "engine and kv_budget exclude one another: an engine caches all tokens alike.",
            remedy="Leave out one of them.",
        )


def plan_request(**options: Any) -> PlanRequest:
    """Build the request from loose options, as in command lines and configuration files.

    Args:
        **options: Fields of one of the requests, None where unset. They determine its type:
            ``tolerance``, ``milliseconds`` with ``costs``, or ``budget``; without any of these it
            is the paper's shape, where unset fields keep everything.

    Raises:
        PlanError: Options are mutually exclusive, or a value is out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    kind = next((kind for key, kind in _KINDS.items() if key in given), PaperRequest)
    known = {each.name for each in fields(kind)}
    foreign = [name for name in given if name not in known and given[name] is not False]
    if foreign:
        raise _excluded(foreign[0], kind, given)
    if kind is LatencyRequest and "costs" not in given:
        raise PlanError("milliseconds needs the costs that `yopo bench --json` measured.")
    return kind(**{name: value for name, value in given.items() if name in known})


_KINDS: dict[str, type[PlanRequest]] = {
    "tolerance": ToleranceRequest,
    "milliseconds": LatencyRequest,
    "budget": BudgetRequest,
}
"""Option that determines the request -> its type; without one it is the paper's shape."""


def _excluded(name: str, kind: type[PlanRequest], given: Mapping[str, Any]) -> PlanError:
    """The error for an option that a kind of request does not take."""
    target = next((key for key, each in _KINDS.items() if each is kind), None)
    if name == "tolerance_on":
        return PlanError(
            "tolerance_on says what a tolerance is a share of, and there is none.",
            remedy="Give --tolerance as well.",
        )
    if target is not None:
        return PlanError(
            f"{target} and {name} exclude one another.",
            remedy="A tolerance already finds the budget and how to spend it."
            if kind is ToleranceRequest
            else "Either give a budget and let it be solved, or give the shape yourself.",
        )
    if name == "kv_budget":
        return PlanError(
            "kv_budget needs a budget, and none is given.",
            remedy="An explicit shape determines what is cached: give --budget instead.",
        )
    return PlanError(f"{name} needs a budget, and none is given.")
