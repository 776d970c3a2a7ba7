"""Turn wishes into a plan: build the shape asked for, or measure candidates at a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from yopo import __version__
from yopo.calibration.statistics import Statistics
from yopo.errors import PlanError, suggest
from yopo.flops import visual_budget
from yopo.plan import Budget, Plan, TensorsFile
from yopo.plan_tensors import PlanTensors
from yopo.planning.paper import paper_layers
from yopo.planning.search import Search
from yopo.planning.shapes import SHAPES, Layers, Shaper
from yopo.planning.wishes import Wishes

UNWRITTEN = TensorsFile("", "")
"""Stands for the side file until the plan is written."""

DEFAULT_SHAPE = "reader-heads"
"""What a budget means when nothing can be measured (no model at hand)."""

Measure = Callable[[Plan, PlanTensors], float]
"""Logit KL of a plan to the dense model on some calibration pairs."""


@dataclass(frozen=True)
class Candidate:
    """A plan shape at the budget and how far it strays from the dense model.

    Attributes:
        shape: Name in ``SHAPES``.
        compensation: ``none`` or ``mean``.
        plan: The plan.
        kl: Logit KL to the dense model, per answer token; None if not measured.
    """

    shape: str
    compensation: str
    plan: Plan
    kl: float | None


def make_plan(
    statistics: Statistics, wishes: Wishes, measure: Measure | None = None
) -> tuple[Plan, PlanTensors, list[Candidate]]:
    """Make the plan that the wishes describe.

    Args:
        statistics: What calibration measured.
        wishes: What is asked for.
        measure: Measures a candidate; None if there is no model at hand: then a budget means
            the shape ``wishes.shape`` or ``DEFAULT_SHAPE``, unmeasured.

    Returns:
        (plan, its tensors, the candidates that were considered, best first).

    Raises:
        PlanError: No shape fits the budget, or the wishes do not fit the model.
    """
    tensors = statistics.plan_tensors()
    if wishes.budget is None:
        return _shape_plan(statistics, wishes), tensors, []
    if wishes.search and measure is None:
        raise PlanError(
            "A search measures plans on the model, and there is none here.",
            remedy="Use `yopo calibrate --search`.",
        )
    found = _candidates(statistics, wishes, measure)
    if measure is not None:
        found = [replace(each, kl=measure(each.plan, tensors)) for each in found]
        found.sort(key=lambda each: each.kl)
        if wishes.search:
            found.insert(0, _search(statistics, wishes, measure, tensors, found[0]))
    best = found[0]
    table = [
        {
            "shape": each.shape,
            "compensation": each.compensation,
            "budget": round(each.plan.budget.reached, 6),
            "kl": None if each.kl is None else float(f"{each.kl:.4g}"),
        }
        for each in found
    ]
    provenance = {**best.plan.provenance, "shape": best.shape, "candidates": table}
    return replace(best.plan, provenance=provenance), tensors, found


def _search(
    statistics: Statistics,
    wishes: Wishes,
    measure: Measure,
    tensors: PlanTensors,
    start: Candidate,
) -> Candidate:
    """Improve the best candidate layer by layer; ``start`` itself if nothing is better."""
    groups = wishes.groups(statistics.model.shape)
    shaper = Shaper(statistics, wishes.budget, groups=groups)
    search = Search(
        shaper,
        lambda layers, kind: measure(_assemble(statistics, wishes, layers, kind), tensors),
        wishes.search,
    )
    layers, kind, kl = search.run(start.plan.layers, start.compensation, start.kl)
    plan = _assemble(statistics, wishes, layers, kind)
    return Candidate(f"search from {start.shape}", kind, plan, kl)


def _shape_plan(statistics: Statistics, wishes: Wishes) -> Plan:
    shape = statistics.model.shape
    layers = paper_layers(
        shape,
        statistics.rho,
        visual_layers=wishes.num_visual_layers(shape),
        head_ratio=wishes.knob("head_ratio"),
        neuron_ratio=wishes.knob("neuron_ratio"),
        radius=wishes.radius_or_default,
        alpha=wishes.alpha,
        groups=wishes.groups(shape),
    )
    return _assemble(statistics, wishes, layers, wishes.compensation or "none")


def _candidates(statistics: Statistics, wishes: Wishes, measure: Measure | None) -> list[Candidate]:
    groups = wishes.groups(statistics.model.shape)
    shaper = Shaper(statistics, wishes.budget, groups=groups)
    name = wishes.shape or (None if measure else DEFAULT_SHAPE)
    if name is None:
        shapes = list(shaper.candidates())
    elif name not in SHAPES:
        raise PlanError(f"Unknown shape '{name}'.", remedy=suggest(name, SHAPES))
    else:
        layers = shaper.build(name)
        is_read = layers is not None and any(layer.heads for layer in layers)
        shapes = [(name, layers)] if is_read else []
    if not shapes:
        raise PlanError(
            f"No plan {'of shape ' + name + ' ' if name else ''}fits a visual budget of "
            f"{wishes.budget}: one layer that reads the image costs "
            f"{shaper.cost((shaper.reader_layer,)):.4f}.",
            remedy="Ask for a larger budget.",
        )
    kinds = (wishes.compensation,) if wishes.compensation else ("mean", "none")
    kinds = kinds if measure or wishes.compensation else ("mean",)
    return [
        Candidate(shape, kind, _assemble(statistics, wishes, layers, kind), None)
        for shape, layers in shapes
        for kind in kinds
    ]


def _assemble(statistics: Statistics, wishes: Wishes, layers: Layers, compensation: str) -> Plan:
    plan = Plan(
        model=statistics.model,
        workload=statistics.workload,
        layers=layers,
        budget=Budget(wishes.budget, 0.0),
        compensation=compensation,
        bidirectional=wishes.bidirectional,
        tensors=UNWRITTEN,
        measured=statistics.measured,
        provenance={"yopo": __version__, **statistics.provenance, **_asked(wishes)},
    )
    return replace(plan, budget=Budget(wishes.budget, visual_budget(plan)))


def _asked(wishes: Wishes) -> dict[str, object]:
    names = ("preset", "head_ratio", "neuron_ratio", "visual_layers", "radius", "alpha")
    asked = {name: getattr(wishes, name) for name in names if getattr(wishes, name) is not None}
    return asked | ({"kv_groups": True} if wishes.kv_groups else {})
