"""Turn a request into a plan: build the paper's shape, or measure candidates at a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from operator import methodcaller

from yopo.calibration.statistics import Statistics
from yopo.fitting.fitter import Fitter
from yopo.planning.allocate import Allocator
from yopo.planning.allocations import Allocations, Measure, without_weights
from yopo.planning.candidate import Candidate, kl_of
from yopo.planning.kv_budget import Build, KVBudget, Storage
from yopo.planning.levers import Levers
from yopo.planning.op_skip import OP_SKIP, Policy, swaps
from yopo.planning.paper import requested_layers
from yopo.planning.reduced import check_request
from yopo.planning.request import BudgetRequest, PaperRequest
from yopo.planning.search import Resolved, Search, State, moves, state_of
from yopo.planning.templates import TEMPLATES, Layers, TemplateBuilder
from yopo.planning.weightings import Weighting
from yopo.plans.flops import visual_budget
from yopo.plans.schema import Budget, PruningPlan
from yopo.plans.servable import engine_problem, layers_problem
from yopo.support.console import track
from yopo.support.errors import PlanError, suggest
from yopo.support.version import __version__

DEFAULT_TEMPLATE = "reader-heads"
"""The template for a budget when nothing can be measured (without the model)."""


def make_plan(
    statistics: Statistics,
    request: BudgetRequest | PaperRequest,
    measure: Measure | None = None,
    fitter: Fitter | None = None,
    tried: Sequence[Weighting] = (),
) -> tuple[PruningPlan, list[Candidate]]:
    """Make the plan that a request describes.

    Args:
        statistics: The calibration's measurements.
        request: The request.
        measure: Measures a candidate; None without a model: a budget then gets the template
            ``request.template`` or ``DEFAULT_TEMPLATE``, unmeasured.
        fitter: Fits visual weights; None: plans have none.
        tried: Measure only allocations with these weightings, and no other candidates.

    Returns:
        (plan, the considered candidates, best first).

    Raises:
        PlanError: No template fits the budget, or the request does not fit the model.
    """
    check_request(statistics, request)
    found: list[Candidate]
    if isinstance(request, PaperRequest):
        layers = requested_layers(statistics, request)
        kind = request.compensation or "none"
        plan, found = Assembler(statistics, request, fitter).assemble(layers, kind), []
    else:
        plan, found = Planner(statistics, request, measure, fitter, tried).make()
    problem = engine_problem(plan) if request.engine else None
    if problem is not None:
        raise PlanError(
            f"This plan cannot be served in {request.engine}: {problem}.",
            remedy="Use `yopo calibrate --engine`, with a budget and without a template.",
        )
    return plan, found


class Assembler:
    """Makes plans from given layers; arguments as for :func:`make_plan`."""

    def __init__(
        self,
        statistics: Statistics,
        request: BudgetRequest | PaperRequest,
        fitter: Fitter | None,
    ):
        self.statistics, self.request, self.fitter = statistics, request, fitter
        self.tensors = statistics.plan_tensors()
        if request.compensation == "refit" and fitter is None:
            raise PlanError(
                "Visual weights are fitted on the model, which is not available here.",
                remedy="Use `yopo calibrate --compensation refit`.",
            )

    def assemble(self, layers: Layers, compensation: str) -> PruningPlan:
        """A plan with the given layers, fitted if its compensation is ``refit``."""
        plan = self._unfitted(layers, compensation)
        return self._fitted([plan])[0] if compensation == "refit" else plan

    def _fitted(self, plans: Sequence[PruningPlan]) -> list[PruningPlan]:
        assert self.fitter is not None, "refit without a fitter was refused"
        return self.fitter.fit(plans)

    def _unfitted(self, layers: Layers, compensation: str) -> PruningPlan:
        requested = self.request.budget if isinstance(self.request, BudgetRequest) else None
        tensors = self.tensors
        if any(layer.key_bits is not None for layer in layers):
            tensors = replace(tensors, key_scale=self.statistics.key_scale)
        plan = PruningPlan(
            model=self.statistics.model,
            workload=self.statistics.workload,
            layers=layers,
            budget=Budget(requested, 0.0),
            compensation=compensation,
            bidirectional=self.request.bidirectional,
            tensors=tensors,
            measured=self.statistics.measured,
            extent=self.statistics.extent,
            reduction=self.statistics.reduction,
            provenance={
                "yopo": __version__,
                **self.statistics.provenance,
                **self.request.provenance(),
            },
        )
        return replace(plan, budget=Budget(requested, visual_budget(plan)))


class Planner(Assembler):
    """Makes the plan for a budget; arguments as for :func:`make_plan`.

    Attributes:
        levers: The levers that allocations may use.
    """

    request: BudgetRequest

    def __init__(
        self,
        statistics: Statistics,
        request: BudgetRequest,
        measure: Measure | None,
        fitter: Fitter | None,
        tried: Sequence[Weighting] = (),
    ):
        super().__init__(statistics, request, fitter)
        self.measure, self.tried = measure, tuple(tried)
        self.levers = Levers(everywhere=request.engine is not None)
        if request.search and measure is None:
            raise PlanError(
                "A search measures plans on the model, which is not available here.",
                remedy="Use `yopo calibrate --search`.",
            )

    def make(self) -> tuple[PruningPlan, list[Candidate]]:
        """The plan and the candidates."""
        found = list(track(self._templates(), label="plans", total=None, unit="plans"))
        found += self._allocated()
        if not found:
            raise self._unaffordable()
        if self.measure is not None:
            found += self._otherwise_stored(min(found, key=kl_of))
            found.sort(key=kl_of)
            if self.request.search:
                found.insert(0, self.improved(found, self.request.search))
        best = found[0]
        table = [
            {
                "template": each.template,
                "compensation": each.compensation,
                "budget": round(each.plan.budget.reached, 6),
                "kl": None if each.kl is None else float(f"{each.kl:.4g}"),
            }
            for each in found
        ]
        provenance = {**best.plan.provenance, "template": best.template, "candidates": table}
        return replace(best.plan, provenance=provenance), found

    def _templates(self) -> Iterator[Candidate]:
        """Every template with every compensation."""
        requested = self.request.compensation
        if self.tried or (requested == "refit" and not self.request.template):
            return
        kinds = (requested,) if requested else ("mean", "none")
        kinds = kinds if self.measure or requested else ("mean",)
        for template, layers in self._built():
            for kind in kinds:
                plan = self.assemble(layers, kind)
                kl = None if self.measure is None else self.measure(plan)
                yield Candidate(template, kind, plan, kl)

    def _allocated(self) -> list[Candidate]:
        """Allocations, if fitted plans may be used and can be measured."""
        may_fit = self.request.compensation in (None, "refit") and not self.request.template
        if not may_fit or self.measure is None or self.fitter is None:
            return []
        if self.tried:
            self.allocations.run(self.tried)
        else:
            self.allocations.explore(self.statistics.model.shape.layers)
        return self.allocations.found

    @cached_property
    def allocations(self) -> Allocations:
        """The allocations of this budget, each in the finest storage that drops no head."""
        return self._stored_in(None)

    def _stored_in(self, storage: Storage | None) -> Allocations:
        assert self.measure is not None, "allocations are measured"

        def fit(many: Sequence[Layers]) -> list[PruningPlan]:
            return self._fitted([self._unfitted(layers, "refit") for layers in many])

        return Allocations(partial(self.allocate, storage=storage), fit, self.measure)

    def allocate(self, weighting: Weighting, storage: Storage | None = None) -> Layers | None:
        """The layers that a weighting gives; None if nothing that reads fits the budget."""
        return self._kv(fitted=True).store(partial(self._allocate_within, weighting), storage)

    def _allocate_within(self, weighting: Weighting, builder: TemplateBuilder) -> Layers | None:
        assert self.fitter is not None, "allocations are made from a fitter's profile"
        return Allocator(builder, self.fitter.profile, weighting, self.levers).allocate()

    def _otherwise_stored(self, best: Candidate) -> list[Candidate]:
        """The best candidate, its visual keys and values stored in other ways."""
        found: list[Candidate] = []
        build, least = self._build_of(best), kl_of(best)
        kv = self._kv(fitted=best.weighting is not None)
        for direction in kv.directions(build):
            reached = kl_of(best)
            for storage in direction:
                layers = kv.store(build, storage)
                if layers is None or layers == best.plan.layers:
                    continue
                made = self._measured(best, layers, storage)
                found.append(made if kl_of(made) < least else without_weights(made))
                least = min(least, kl_of(made))
                if kl_of(made) >= reached:
                    break
                reached = kl_of(made)
        return found

    def _measured(self, best: Candidate, layers: Layers, storage: Storage) -> Candidate:
        plan = self.assemble(layers, best.compensation)
        assert self.measure is not None, "storages are compared by measuring"
        kl, name = self.measure(plan), f"{best.template}, {storage}"
        return Candidate(name, best.compensation, plan, kl, best.weighting, storage)

    def _build_of(self, candidate: Candidate) -> Build:
        if candidate.weighting is not None:
            return partial(self._allocate_within, candidate.weighting)
        return methodcaller("candidate", candidate.template)

    def improved(self, found: list[Candidate], max_runs: int) -> Candidate:
        """Improve the first of the measured candidates; returned as it is if nothing is better."""
        start = found[0]
        if start.weighting is not None:
            allocations = self.allocations
            if start.storage is not None:
                allocations = self._stored_in(start.storage)
                allocations.found.append(start)
            best = allocations.vary(max_runs)
            return start if best is start else replace(best, template=f"search, {best.template}")
        first = start.plan.layers, start.compensation
        known = {(each.plan.layers, each.compensation): kl_of(each) for each in found}
        how = (partial(self._resolve, start.storage), self._kl, max_runs, known)
        if start.template == OP_SKIP:
            policy = Policy.early(len(first[0]), first[1])
            (layers, kind), kl = Search[Policy](swaps, *how).run(policy, first, kl_of(start))
        else:
            steps = partial(moves, builder=self._builder)
            states = Search[State](steps, *how)
            (layers, kind), kl = states.run(state_of(*first), first, kl_of(start))
        if layers == start.plan.layers and kind == start.compensation:
            return start
        plan = self.assemble(layers, kind)
        return Candidate(f"search from {start.template}", kind, plan, kl)

    def _resolve(self, storage: Storage | None, state: State | Policy) -> Resolved | None:
        layers = self._kv().store(state.layers, storage)
        if layers is None or not self._is_servable(layers):
            return None
        return layers, state.compensation

    def _kl(self, layers: Layers, kind: str) -> float:
        assert self.measure is not None, "a search is refused without a measure"
        return self.measure(self.assemble(layers, kind))

    @cached_property
    def _builder(self) -> TemplateBuilder:
        groups = self.request.group(self.statistics.model.shape)
        kv_budget = 1.0 if self.request.kv_budget is None else self.request.kv_budget
        return TemplateBuilder(
            self.statistics, self.request.budget, groups=groups, kv_budget=kv_budget
        )

    def _kv(self, *, fitted: bool = False) -> KVBudget:
        """The budget of KV bytes, for templates or for allocations."""
        is_limited = self.request.kv_budget is not None
        return KVBudget.of(self._builder, is_limited=is_limited, has_latents=fitted)

    def _built(self) -> Iterator[tuple[str, Layers]]:
        """Templates that fit, stored within the budget of KV bytes, without duplicates."""
        name = self.request.template or (None if self.measure else DEFAULT_TEMPLATE)
        if name is not None and name not in TEMPLATES:
            raise PlanError(f"Unknown template '{name}'.", remedy=suggest(name, TEMPLATES))
        seen: set[Layers] = set()
        for each in TEMPLATES if name is None else (name,):
            layers = self._kv().store(methodcaller("candidate", each))
            if layers is not None and layers not in seen and (name or self._is_servable(layers)):
                seen.add(layers)
                yield each, layers

    def _is_servable(self, layers: Layers) -> bool:
        """Whether the request's engine, if it names one, could run layers."""
        shape = self.statistics.model.shape
        return self.request.engine is None or layers_problem(layers, shape) is None

    def _unaffordable(self) -> PlanError:
        builder = self._builder
        name = self.request.template or (None if self.measure else DEFAULT_TEMPLATE)
        kind = f"of template {name} " if name else ""
        layers: Layers = (builder.reader_layer,)
        subject = "one layer that reads the image"
        if self.request.engine is not None:
            subject = f"reading the image in all layers, as {self.request.engine} requires,"
            layers = self._least_everywhere()
        costs = f"costs {builder.cost(layers):.4f}"
        cached = ""
        if self.request.kv_budget is not None:
            cached = f" and a KV budget of {self.request.kv_budget}"
            costs += f" and caches {self._kv().least_share():.4f}"
        return PlanError(
            f"No plan {kind}fits a visual budget of {self.request.budget}{cached}: {subject} "
            f"{costs}.",
            remedy="Use a larger budget.",
        )

    def _least_everywhere(self) -> Layers:
        """The cheapest layers that all read: through the smallest bottleneck, if one is fitted."""
        shape, rank = self.statistics.model.shape, None
        if self.fitter is not None:
            rank = max(1, round(min(self.levers.ranks) * shape.hidden))
        return (replace(self._builder.reader_layer, qkv_rank=rank),) * shape.layers
