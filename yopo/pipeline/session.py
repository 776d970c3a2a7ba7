"""One calibration pass, then any number of plans: for one budget, several, or a tolerance.

A session keeps the model, the statistics and the dense model's answers, so that each further plan
only costs its own fit and measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import ProcessorMixin

from yopo.calibration.measure import measure
from yopo.calibration.questions import with_constants
from yopo.calibration.statistics import Statistics
from yopo.data.prompts import Batch
from yopo.data.sizes import in_sizes
from yopo.data.split import MIN_SIDE, describe, pick, split_pairs, too_few, warn_if_few
from yopo.evaluation.fidelity import Fidelity, Recorded, answers_of, kinds_of_records
from yopo.fitting.fitter import Fitter
from yopo.fitting.states import room_for
from yopo.pipeline.encoded import encoded
from yopo.pipeline.judge import Judge
from yopo.pipeline.latency import in_flops
from yopo.pipeline.model_handle import Model, ModelHandle
from yopo.pipeline.needs.check import check_calibration
from yopo.pipeline.opening import check_named, open_for
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.progress import PlanProgress, most_plans
from yopo.pipeline.size_note import note_if_one_size
from yopo.pipeline.tail import quality_entry, tail_of
from yopo.pipeline.tolerance import (
    Agreement,
    agreement_on,
    all_of,
    note_result,
    provenance_of,
    warn_if_unsupported,
)
from yopo.pipeline.work import (
    about,
    keep_statistics,
    load_kept_statistics,
    open_for_calibration,
)
from yopo.pipeline.work_status import note_begun, note_finished, note_plans
from yopo.planning.candidate import Candidate
from yopo.planning.planner import make_plan
from yopo.planning.request import (
    BudgetRequest,
    PaperRequest,
    PlanRequest,
    ToleranceRequest,
)
from yopo.planning.weightings import Weighting, around
from yopo.plans.schema import LayerPlan, PruningPlan, full_plan
from yopo.support.console import note, warn
from yopo.support.errors import PlanError
from yopo.support.version import __version__

SMALLEST = 0.01
"""Smallest visual budget tried for a tolerance."""

PRECISION = 1.15
"""Ratio of two budgets at which the bisection for a tolerance stops."""


@dataclass(frozen=True)
class Calibrated:
    """The result of a calibration: the plan, the statistics and the candidates."""

    plan: PruningPlan
    statistics: Statistics
    candidates: list[Candidate] = field(default_factory=list)


class CalibrationSession:
    """A model, measured once on pairs.

    Args:
        model: Alias, directory, hub id, or a dense model in memory; or a handle on one.
        processor: Processor of a model in memory.
        options: The data and how to run it.
        fit_options: How plans are measured and fitted.
        holdout: Pairs held out for ``agreement`` only, at most: never more than a quarter.
        compares: Whether pairs are held out to compare plans. Without them ``make`` does not take
            a budget, and all pairs are measured.
        requests: What ``make`` will be given: the work of other requests is not reused.

    Attributes:
        split: The purpose of each pair.
        judge: Compares plans with the dense model.

    Raises:
        YopoError: Unknown model, unreadable data, ...
    """

    def __init__(
        self,
        model: Model | ModelHandle,
        options: RunOptions,
        fit_options: FitOptions,
        *,
        processor: ProcessorMixin | None = None,
        holdout: int = 0,
        compares: bool = True,
        requests: Sequence[PlanRequest] = (),
    ):
        self.options, self.fit_options = options, fit_options
        if options.data is None and isinstance(model, str | Path):
            check_named(str(model), "calibration")
        handle = model if isinstance(model, ModelHandle) else ModelHandle(model, processor, options)
        self.processor = handle.processor
        pairs = open_for(handle, options, handle.name, "calibration")
        self._pairs = in_sizes(pairs, fit_options.grids)
        self.split = split_pairs(
            self._pairs,
            seed=options.seed,
            fit=fit_options.fit_pairs,
            comparison=fit_options.measure_pairs if compares else 0,
            holdout=holdout,
        )
        if holdout and not self.split.holdout:
            raise too_few(self.split, "to hold some out for a tolerance", 3 * MIN_SIDE)
        warn_if_few(self.split)
        check_calibration(handle, self._pairs, self.split, options, fit_options, requests)
        self.model = handle.model
        measured = pick(self._pairs, self.split.statistics)
        reduction = with_constants(fit_options.reduction, self.model, self.processor, measured)
        fit_options = self.fit_options = replace(fit_options, reduction=reduction)
        self._work = open_for_calibration(
            self.model, self.processor, self._pairs, options, fit_options, requests
        )
        try:
            layers = len(self.model.get_decoder().layers)
            note_begun(self._work, {**self.split.summary, "layers": layers})
            found = load_kept_statistics(self._work) or self._measure(handle.name)
        except BaseException:
            self.close()
            raise
        self.statistics = replace(found, model=replace(found.model, path=handle.path))
        note_if_one_size(self.model, self.processor, self._pairs, self.statistics.extent)
        room = room_for(self.model, fit_options.work_dir)
        self.judge = Judge(
            self.model, self.processor, self._pairs, self.split, options, self._work, room
        )
        kept = (self._work, self.judge.has_judged, room)
        self.fitter = Fitter(self.model, self._encoded, fit_options.reduction, *kept)
        self._progress: PlanProgress | None = None
        self._judged: dict[tuple[tuple[LayerPlan, ...], str], Fidelity] = {}

    def finish(self) -> None:
        """Say in the work directory, if there is one, that all is done."""
        self.fitter.tidy()
        note_finished(self._work)

    def close(self) -> None:
        """Let other processes use the work directory, if there is one."""
        self._work.close()

    def _measure(self, name: str) -> Statistics:
        found = measure(
            self.model,
            self.processor,
            pick(self._pairs, self.split.statistics),
            name=name,
            total=len(self.split.statistics),
            batch_size=self.options.batch_size,
            queries=self.fit_options.queries,
            reduction=self.fit_options.reduction,
            provenance=about(self._pairs, self.options, self.fit_options),
            work=self._work,
        )
        keep_statistics(self._work, found)
        return found

    def make(self, request: PlanRequest) -> Calibrated:
        """Make the plan that a request describes.

        With too few pairs to hold any out, nothing is fitted: the plan for a budget then has the
        default template and the original weights, unmeasured.

        Raises:
            PlanError: The request cannot be met.
            DataError: There are too few pairs for the request.
        """
        if isinstance(request, ToleranceRequest):
            return self._within(request)
        return self._make(in_flops(request, self.statistics))

    def _make(
        self, request: BudgetRequest | PaperRequest, tried: Sequence[Weighting] = ()
    ) -> Calibrated:
        """Make a plan; with ``tried``, only allocations with these weightings are measured."""
        request = self._with_few_pairs(request)
        if isinstance(request, BudgetRequest):
            most = most_plans(request, len(tried))
            self._progress = PlanProgress(most)
            note_plans(self._work, most)
        is_measured = isinstance(request, BudgetRequest) and self.split.comparison
        judge = self.kl if is_measured else None
        plan, candidates = make_plan(self.statistics, request, judge, self.fitter, tried)
        plan = self.fitter.complete(plan)
        provenance = {**plan.provenance, "split": self.split.summary}
        if is_measured:
            kinds = kinds_of_records(self.comparison)
            judged = self._judged[plan.layers, plan.compensation]
            provenance["quality"] = quality_entry(plan, judged, kinds)
            table = zip(plan.provenance["candidates"], candidates, strict=True)
            provenance["candidates"] = [
                entry | tail_of(self._judged[each.plan.layers, each.compensation], kinds)
                for entry, each in table
            ]
        return Calibrated(replace(plan, provenance=provenance), self.statistics, candidates)

    def _with_few_pairs(
        self, request: BudgetRequest | PaperRequest
    ) -> BudgetRequest | PaperRequest:
        """The request, reduced to what the number of pairs allows.

        Raises:
            DataError: A fit or a search is requested, and there are too few pairs.
        """
        split, has_budget = self.split, isinstance(request, BudgetRequest)
        if split.comparison if has_budget else len(split.fit) >= MIN_SIDE:
            return request
        searches = isinstance(request, BudgetRequest) and request.search
        if request.compensation == "refit" or searches:
            what = "to search" if searches else "to fit visual weights"
            raise too_few(split, what, 2 * MIN_SIDE if has_budget else MIN_SIDE)
        if not has_budget:
            return request
        warn(
            f"{describe(split)}: too few to hold any out, so nothing is fitted or compared: the "
            "plan has the default template and the original weights."
        )
        return replace(request, compensation=request.compensation or "none")

    def kl(self, plan: PruningPlan) -> float:
        """Logit KL of a plan to the dense model on the held-out pairs."""
        found = self.judge.compare(plan, "comparison")
        self.fitter.judged(plan, found.kl)
        if self._progress is not None:
            self._progress.add(plan, found.kl)
        self._judged[plan.layers, plan.compensation] = found
        return found.kl

    def agreement(self, plan: PruningPlan, measure: str = "tokens") -> Agreement:
        """How many ``tokens`` or ``answers`` a plan predicts as the dense model does, on the
        holdout."""
        return agreement_on(self.judge.compare(plan, "holdout"), measure)

    def _within(self, request: ToleranceRequest) -> Calibrated:
        """The plan of the smallest budget whose agreement stays within the tolerance.

        Raises:
            PlanError: The request cannot be met.
        """
        tolerance, low, high = request.tolerance, SMALLEST, 1.0
        answers = answers_of(self.judge.holdout)
        best, pairs = self._unpruned(), len(answers)
        agreement = all_of(answers, request.tolerance_on)
        warn_if_unsupported(request, agreement, pairs)
        tried: tuple[Weighting, ...] = ()
        while high / low > PRECISION:
            budget = round((low * high) ** 0.5, 4)
            found = self._at(request.at(budget), tried)
            if found is None:
                note(f"budget {budget:.1%}: no plan")
                low = budget
                continue
            reached = self.agreement(found.plan, request.tolerance_on)
            note(f"budget {budget:.1%}: agreement {reached.share:.2%} on the holdout")
            if reached.is_within(tolerance):
                best, high, agreement = found, budget, reached
            else:
                low = budget
            tried = around(found.candidates[0].weighting)
        if request.kv_budget is not None and best.plan.budget.reached >= 1.0:
            raise PlanError(
                f"No plan within a KV budget of {request.kv_budget} agrees with the dense model "
                f"within {tolerance:.1%}.",
                remedy="Use a larger KV budget or tolerance.",
            )
        met = provenance_of(request, agreement, pairs)
        plan = replace(best.plan, provenance={**best.plan.provenance, "tolerance": met})
        note_result(plan, request, agreement, pairs)
        return replace(best, plan=plan)

    def _at(self, request: BudgetRequest, tried: Sequence[Weighting]) -> Calibrated | None:
        try:
            return self._make(request, tried)
        except PlanError:
            return None

    def _unpruned(self) -> Calibrated:
        statistics = self.statistics
        plan = full_plan(statistics.model, statistics.workload)
        provenance = {"yopo": __version__, **statistics.provenance}
        provenance |= {"template": "everything is kept", "split": self.split.summary}
        plan = replace(
            plan, measured=statistics.measured, extent=statistics.extent, provenance=provenance
        )
        return Calibrated(plan, statistics)

    @property
    def comparison(self) -> list[Recorded]:
        """The dense model's answers to the pairs that plans are compared on."""
        return self.judge.comparison

    def _encoded(self) -> Iterator[Batch]:
        """The prompts that visual weights are fitted on."""
        pairs = pick(self._pairs, self.split.fit)
        return encoded(self.model, self.processor, pairs, self.options.batch_size)
