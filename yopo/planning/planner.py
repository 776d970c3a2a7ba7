"""Turn wishes into a plan: build the shape asked for, or measure candidates at a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from yopo import __version__
from yopo.calibration.statistics import Statistics
from yopo.fitting.fitter import Fitter
from yopo.planning.allocate import (
    FACTOR,
    VISUAL_WEIGHTS,
    Allocator,
    Levers,
    Weighting,
    weighting_moves,
)
from yopo.planning.paper import paper_layers
from yopo.planning.request import Wishes
from yopo.planning.search import Search, moves, resolve, state_of
from yopo.planning.templates import TEMPLATES, Layers, TemplateBuilder
from yopo.plans.flops import visual_budget
from yopo.plans.schema import Budget, PruningPlan
from yopo.strategies.neighbors import PAPER_RADIUS
from yopo.support.console import track
from yopo.support.errors import PlanError, suggest

DEFAULT_TEMPLATE = "reader-heads"
"""What a budget means when nothing can be measured (no model at hand)."""

Measure = Callable[[PruningPlan], float]
"""Logit KL of a plan to the dense model on pairs that nothing was fitted on."""


@dataclass(frozen=True)
class Candidate:
    """A plan at the budget and how far it strays from the dense model.

    Attributes:
        shape: Name in ``TEMPLATES``, or how the budget was allocated.
        compensation: ``none``, ``mean`` or ``refit``.
        plan: The plan.
        kl: Logit KL to the dense model, per answer token; None if not measured.
        worth: What the allocation was made by, if it was one.
    """

    shape: str
    compensation: str
    plan: PruningPlan
    kl: float | None
    weighting: Weighting | None = None


def make_plan(
    statistics: Statistics,
    wishes: Wishes,
    measure: Measure | None = None,
    fitter: Fitter | None = None,
) -> tuple[PruningPlan, list[Candidate]]:
    """Make the plan that the wishes describe.

    Args:
        statistics: What calibration measured.
        wishes: What is asked for.
        measure: Measures a candidate; None if there is no model at hand: then a budget means
            the shape ``wishes.shape`` or ``DEFAULT_TEMPLATE``, unmeasured.
        fitter: Fits visual weights of their own; None: plans go without.

    Returns:
        (plan, the candidates that were considered, best first).

    Raises:
        PlanError: No shape fits the budget, or the wishes do not fit the model.
    """
    return Planner(statistics, wishes, measure, fitter).make()


class Planner:
    """Makes one plan; arguments as for :func:`make_plan`.

    ``tried``: measure allocations by these worths, and no other candidate.

    Attributes:
        levers: What allocations may use.
    """

    def __init__(
        self,
        statistics: Statistics,
        wishes: Wishes,
        measure: Measure | None,
        fitter: Fitter | None,
        tried: Sequence[Weighting] = (),
    ):
        self.tried = tuple(tried)
        self.levers = Levers()
        self.statistics, self.wishes = statistics, wishes
        self.measure, self.fitter = measure, fitter
        self.tensors = statistics.plan_tensors()
        if wishes.search and measure is None:
            raise PlanError(
                "A search measures plans on the model, and there is none here.",
                remedy="Use `yopo calibrate --search`.",
            )
        if wishes.compensation == "refit" and fitter is None:
            raise PlanError(
                "Visual weights are fitted on the model, and there is none here.",
                remedy="Use `yopo calibrate --compensation refit`.",
            )

    def make(self) -> tuple[PruningPlan, list[Candidate]]:
        """Plan and candidates."""
        if self.wishes.budget is None:
            kind = self.wishes.compensation or "none"
            plan = self.assemble(self._paper_layers(), kind)
            return plan, []
        found = list(track(self.candidates(), label="plans", total=None, unit="plans"))
        if not found:
            raise self._unaffordable()
        if self.measure is not None:
            found.sort(key=lambda each: each.kl)
            if self.wishes.search:
                found.insert(0, self.improved(found))
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
        return replace(best.plan, provenance=provenance), found

    def candidates(self) -> Iterator[Candidate]:
        """Every shape with every kind of compensation, and allocations, each measured."""
        asked = self.wishes.compensation
        kinds = (asked,) if asked else ("mean", "none")
        kinds = kinds if self.measure or asked else ("mean",)
        allocates = asked in (None, "refit") and not self.wishes.shape
        if not self.tried and (asked != "refit" or self.wishes.shape):
            for shape, layers in self._shapes():
                for kind in kinds:
                    yield self.candidate(shape, layers, kind)
        if allocates and self.measure is not None and self.fitter is not None:
            yield from self._allocated()

    def candidate(
        self, shape: str, layers: Layers, kind: str, weighting: Weighting | None = None
    ) -> Candidate:
        """Assemble and measure."""
        plan = self.assemble(layers, kind)
        kl = None if self.measure is None else self.measure(plan)
        return Candidate(shape, kind, plan, kl, weighting)

    def _allocated(self) -> Iterator[Candidate]:
        """Allocations at a few exchange rates, then around the best of them."""
        found: list[Candidate] = []
        layers = self.statistics.model.shape.layers
        tried = self.tried or [
            Weighting.even(rate, radius, layers)
            for radius in (None, PAPER_RADIUS)
            for rate in VISUAL_WEIGHTS
        ]
        for weighting in tried:
            yield from self._new_allocation(weighting, found)
        if not found or self.tried:
            return
        best = min(found, key=lambda each: each.kl).weighting
        for factor in (FACTOR, 1 / FACTOR):
            yield from self._new_allocation(replace(best, rate=best.rate * factor), found)

    def _new_allocation(self, weighting: Weighting, found: list[Candidate]) -> Iterator[Candidate]:
        layers = self._allocate(weighting)
        if layers is not None and layers not in (each.plan.layers for each in found):
            found.append(self.candidate(f"allocated, {weighting}", layers, "refit", weighting))
            yield found[-1]

    def _allocate(self, weighting: Weighting) -> Layers | None:
        return Allocator(self._builder(), self.fitter.profile, weighting, self.levers).allocate()

    def improved(self, found: list[Candidate]) -> Candidate:
        """Improve the first of the measured candidates; itself if nothing is better."""
        start = found[0]
        first = (start.plan.layers, start.compensation)
        known = {(each.plan.layers, each.compensation): each.kl for each in found}
        if start.weighting is not None:

            def allocated(weighting: Weighting) -> tuple[Layers, str] | None:
                layers = self._allocate(weighting)
                return None if layers is None else (layers, "refit")

            search = Search(weighting_moves, allocated, self._kl, self.wishes.search, known)
            (layers, kind), kl = search.run(start.weighting, first, start.kl)
        else:
            builder = self._builder()
            search = Search(
                lambda state: moves(state, builder),
                lambda state: resolve(state, builder),
                self._kl,
                self.wishes.search,
                known,
            )
            (layers, kind), kl = search.run(state_of(*first), first, start.kl)
        if layers == start.plan.layers and kind == start.compensation:
            return start
        plan = self.assemble(layers, kind)
        return Candidate(f"search from {start.shape}", kind, plan, kl)

    def _kl(self, layers: Layers, kind: str) -> float:
        return self.measure(self.assemble(layers, kind))

    def assemble(self, layers: Layers, compensation: str) -> PruningPlan:
        """A plan of some layers, fitted if its compensation is ``refit``."""
        plan = PruningPlan(
            model=self.statistics.model,
            workload=self.statistics.workload,
            layers=layers,
            budget=Budget(self.wishes.budget, 0.0),
            compensation=compensation,
            bidirectional=self.wishes.bidirectional,
            tensors=self.tensors,
            measured=self.statistics.measured,
            provenance={"yopo": __version__, **self.statistics.provenance, **self._asked()},
        )
        plan = replace(plan, budget=Budget(self.wishes.budget, visual_budget(plan)))
        return plan if compensation != "refit" else self.fitter.fit(plan)

    def _builder(self) -> TemplateBuilder:
        groups = self.wishes.groups(self.statistics.model.shape)
        kv_budget = 1.0 if self.wishes.kv_budget is None else self.wishes.kv_budget
        return TemplateBuilder(
            self.statistics, self.wishes.budget, groups=groups, kv_budget=kv_budget
        )

    def _paper_layers(self) -> Layers:
        wishes, shape = self.wishes, self.statistics.model.shape
        return paper_layers(
            shape,
            self.statistics.rho,
            visual_layers=wishes.num_visual_layers(shape),
            head_ratio=wishes.knob("head_ratio"),
            neuron_ratio=wishes.knob("neuron_ratio"),
            radius=wishes.radius_or_default,
            alpha=wishes.alpha,
            groups=wishes.groups(shape),
        )

    def _shapes(self) -> list[tuple[str, Layers]]:
        builder = self._builder()
        name = self.wishes.shape or (None if self.measure else DEFAULT_TEMPLATE)
        if name is None:
            shapes = list(builder.candidates())
        elif name not in TEMPLATES:
            raise PlanError(f"Unknown shape '{name}'.", remedy=suggest(name, TEMPLATES))
        else:
            layers = builder.build(name)
            is_read = layers is not None and any(layer.heads for layer in layers)
            shapes = [(name, layers)] if is_read else []
        return shapes

    def _unaffordable(self) -> PlanError:
        builder = self._builder()
        name = self.wishes.shape or (None if self.measure else DEFAULT_TEMPLATE)
        kind = f"of shape {name} " if name else ""
        costs = f"costs {builder.cost((builder.reader_layer,)):.4f}"
        cached = ""
        if self.wishes.kv_budget is not None:
            cached = f" and a KV budget of {self.wishes.kv_budget}"
            costs += f" and caches {builder.kv_share((builder.reader_layer,)):.4f}"
        return PlanError(
            f"No plan {kind}fits a visual budget of {self.wishes.budget}{cached}: one layer that "
            f"reads the image {costs}.",
            remedy="Ask for a larger budget.",
        )

    def _asked(self) -> dict[str, object]:
        names = ("preset", "head_ratio", "neuron_ratio", "visual_layers", "radius", "alpha")
        names += ("kv_budget",)
        values = {name: getattr(self.wishes, name) for name in names}
        asked = {name: value for name, value in values.items() if value is not None}
        return asked | ({"kv_groups": True} if self.wishes.kv_groups else {})
