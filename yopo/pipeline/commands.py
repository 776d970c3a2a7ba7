"""The commands as functions, as in ``import yopo``: one call each."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from yopo.calibration.statistics import Statistics
from yopo.calibration.statistics_file import load_statistics
from yopo.checkpoint.bake import BakeReport, bake
from yopo.checkpoint.reader import fetch
from yopo.evaluation.evaluate import Evaluation
from yopo.evaluation.evaluate import evaluate as evaluate_plan
from yopo.models.registry import ModelSource, is_hub_id, resolve
from yopo.pipeline.model_handle import Model, ModelHandle
from yopo.pipeline.needs.check import check_evaluation
from yopo.pipeline.opening import check_named, note_other_processor, open_for
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.session import Calibrated, CalibrationSession
from yopo.pipeline.shares import check_shares, choose_share
from yopo.pipeline.tolerance import holdout_pairs
from yopo.pipeline.verification import Verification, verify
from yopo.planning.planner import make_plan
from yopo.planning.reduced import check_reduction
from yopo.planning.request import (
    BudgetRequest,
    LatencyRequest,
    PaperRequest,
    PlanRequest,
    ToleranceRequest,
)
from yopo.plans.evaluated import with_evaluation
from yopo.plans.made_up import refuse_made_up
from yopo.plans.schema import PruningPlan
from yopo.plans.storage import read_plan
from yopo.serving.loading import open_baked
from yopo.support.errors import ModelError, PlanError

Keep = Callable[[Statistics], None]

DEFAULT_BUDGET = 0.25
"""Default share of the visual FLOPs."""


def calibrate(
    model: Model,
    request: PlanRequest | float = DEFAULT_BUDGET,
    *,
    processor: ProcessorMixin | None = None,
    options: RunOptions | None = None,
    fit_options: FitOptions | None = None,
    keep: Keep | None = None,
) -> Calibrated:
    """Measure a model on image-question pairs once and plan its pruning (``yopo calibrate``).

    Example:
        >>> options = yopo.RunOptions(samples=32)
        >>> calibrated = yopo.calibrate("llava-tiny", 0.25, options=options)
        >>> yopo.write_plan(calibrated.plan, "plan.yaml")
        >>> calibrated.plan.budget.reached <= 0.25
        True

        With a model in memory, such as a fine-tune, and your own rows:

        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from yopo.demo import LLAVA_TINY
        >>> model = AutoModelForImageTextToText.from_pretrained(LLAVA_TINY)
        >>> processor = AutoProcessor.from_pretrained(LLAVA_TINY)
        >>> rows = [{"image": image, "question": "How many shapes?"} for image in images]
        >>> options = yopo.RunOptions(data=rows)
        >>> request = yopo.PaperRequest(preset="yopo-25")
        >>> plan = yopo.calibrate(model, request, processor=processor, options=options).plan
        >>> with yopo.pruned(model, plan):
        ...     yopo.is_pruned(model)
        True

    Args:
        model: Alias, directory, hub id, or a dense model in memory.
        request: The request for the plan; a number is a visual budget.
        processor: Processor of a model in memory.
        options: The data and how to run it.
        fit_options: How plans are measured and fitted.
        keep: Called with the statistics once they exist, before anything is planned or fitted.

    Raises:
        YopoError: Unknown model, unreadable data, a request that cannot be met, ...
    """
    request = _as_request(request)
    options, fit_options = options or RunOptions(), fit_options or FitOptions()
    check_reduction(fit_options.reduction, request)
    if fit_options.shares:
        check_shares(request)
        handle = ModelHandle(model, processor, options)
        return choose_share(handle, request, options, fit_options, keep=keep)
    session = CalibrationSession(
        model,
        options,
        fit_options,
        processor=processor,
        holdout=holdout_pairs(request) if isinstance(request, ToleranceRequest) else 0,
        compares=not isinstance(request, PaperRequest),
        requests=(request,),
    )
    with closing(session):
        if keep is not None:
            keep(session.statistics)
        made = session.make(request)
        session.finish()
        return made


def calibrate_front(
    model: Model,
    requests: Sequence[BudgetRequest],
    *,
    processor: ProcessorMixin | None = None,
    options: RunOptions | None = None,
    fit_options: FitOptions | None = None,
    keep: Keep | None = None,
) -> Iterator[Calibrated]:
    """Measure a model once and yield a plan for every budget, largest first.

    The plans share their neuron order, so one baked checkpoint serves them all.

    Raises:
        YopoError: As for ``calibrate``.
    """
    fit_options = fit_options or FitOptions()
    if fit_options.shares:
        check_shares(*requests)
    for each in requests:
        check_reduction(fit_options.reduction, each)
    session = CalibrationSession(
        model, options or RunOptions(), fit_options, processor=processor, requests=requests
    )
    with closing(session):
        if keep is not None:
            keep(session.statistics)
        for request in sorted(requests, key=lambda each: -each.budget):
            yield session.make(request)
        session.finish()


def plan(
    statistics: Statistics | str | Path, request: PlanRequest | float = DEFAULT_BUDGET
) -> Calibrated:
    """Make another plan from statistics, without the model (``yopo plan``).

    Without it nothing can be measured or fitted: a budget gets the requested or default template.

    Example:
        >>> found = yopo.plan(calibrated.statistics, yopo.PaperRequest(preset="yopo-12"))
        >>> found.plan.visual_depth  # half of the layers
        4

    Args:
        statistics: A calibration's statistics, or the file that they were saved to.
        request: The request for the plan; a number is a visual budget.

    Raises:
        YopoError: The file holds no statistics, or the request cannot be met.
    """
    request = _as_request(request)
    if isinstance(request, (ToleranceRequest, LatencyRequest)):
        raise PlanError(
            "A tolerance and a budget in milliseconds need the model.",
            remedy="Use `yopo calibrate`.",
        )
    if not isinstance(statistics, Statistics):
        statistics = load_statistics(statistics)
    found, candidates = make_plan(statistics, request)
    return Calibrated(found, statistics, candidates)


def _as_request(request: PlanRequest | float) -> PlanRequest:
    return BudgetRequest(request) if isinstance(request, (int, float)) else request


def evaluate(
    target: PruningPlan | str | Path,
    *,
    model: Model | None = None,
    processor: ProcessorMixin | None = None,
    options: RunOptions | None = None,
    timing_runs: int = 15,
    budget: float | None = None,
    examples: int = 0,
) -> Evaluation:
    """Compare the pruned model with the dense one on the same pairs (``yopo eval``).

    Example:
        >>> options = yopo.RunOptions(samples=16)
        >>> found = yopo.evaluate("plan.yaml", options=options, timing_runs=0)
        >>> found.pairs, found.fidelity.agreement > 0.5
        (16, True)

    Args:
        target: A plan, its file, or ``-`` for stdin; or a baked checkpoint (directory or hub id).
        model: The dense model, if it is in memory or not where the plan says.
        processor: Processor of a model in memory.
        options: The data and how to run it.
        timing_runs: Paired prefill runs; 0 skips timing.
        budget: Which of a checkpoint's plans (see ``yopo.load``); None: the first.
        examples: Pairs to show with their images, for ``yopo report``.

    Raises:
        YopoError: The model, the plan or the data are unusable.
    """
    options = options or RunOptions()
    found = target if isinstance(target, PruningPlan) else read_target(target, budget)
    refuse_made_up(found)
    if options.data is None:
        typed = None if isinstance(target, PruningPlan) else f"yopo eval {shlex.quote(str(target))}"
        check_named(found.model.name, "heldout", typed=typed, family=found.model.family)
    if isinstance(model, PreTrainedModel):
        handle = ModelHandle(model, processor, options)
    else:
        source = source_of_target(target, found, model)
        handle = ModelHandle(source, processor, options)
    note_other_processor(found, options)
    pairs = open_for(handle, options, found.model.name, "heldout")
    check_evaluation(handle, pairs, found, options, timing_runs)
    return evaluate_plan(
        handle.model,
        handle.processor,
        found,
        pairs,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        timing_runs=timing_runs,
        total=pairs.total,
        examples=examples,
    )


def read_target(target: str | Path, budget: float | None = None) -> PruningPlan:
    """The plan of a baked checkpoint (directory or hub id), of a plan file, or of stdin for ``-``.

    Raises:
        PlanError: A budget is given for a target that is not a checkpoint.
    """
    if _is_checkpoint(target):
        return open_baked(target, budget).plan
    if budget is not None:
        raise PlanError(f"{target}: is one plan; a budget selects among a checkpoint's plans.")
    return read_plan(target)


def source_of_target(
    target: PruningPlan | str | Path, plan: PruningPlan, model: str | Path | None
) -> ModelSource:
    """The dense model of a target: a checkpoint is its own, a plan names its model."""
    if not isinstance(target, PruningPlan) and _is_checkpoint(target):
        return resolve(str(target))
    return _source_of(plan, model)


def _is_checkpoint(target: str | Path) -> bool:
    path = Path(target)
    if str(target) == "-" or path.is_file() or path.suffix in (".yaml", ".yml"):
        return False
    return path.is_dir() or is_hub_id(str(target))


@dataclass(frozen=True)
class Applied:
    """The result of ``apply``.

    Attributes:
        plan: The given plan.
        report: The report of the bake; ``report.output`` is the checkpoint.
        verification: The verification, if requested.
    """

    plan: PruningPlan
    report: BakeReport
    verification: Verification | None


def apply(
    plan: PruningPlan | str | Path,
    *others: PruningPlan | str | Path,
    output: str | Path | None = None,
    model: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    check: bool = False,
    evaluation: str | Path | None = None,
) -> Applied:
    """Bake a plan, or several for one model, into a copy of its checkpoint (``yopo apply``).

    Example:
        >>> done = yopo.apply("plan.yaml", output="llava-tiny-yopo")
        >>> model = yopo.load("llava-tiny-yopo")
        >>> yopo.is_pruned(model)
        True

    Args:
        plan: A plan, its file, or ``-`` for stdin.
        others: Plans for other budgets, for ``yopo.load(directory, budget=...)``.
        output: The directory to create; None: ``NAME-yopo`` in the working directory.
        model: The checkpoint, if it is not where the plan says.
        force: Whether a checkpoint in ``output`` may be replaced.
        dry_run: Validate everything, write nothing.
        check: Whether to open the result and compare it with the original.
        evaluation: The output of ``yopo eval --json`` on the first plan, for the model card.

    Raises:
        YopoError: The plan, the model or the output directory is unusable.
    """
    plan, *also = (
        each if isinstance(each, PruningPlan) else read_plan(each) for each in (plan, *others)
    )
    if evaluation is not None:
        plan = with_evaluation(plan, evaluation)
    source = fetch(_source_of(plan, model))
    if output is None:
        output = f"{plan.model.name.partition('@')[0].rpartition('/')[2]}-yopo"
    report = bake(plan, source, output, also=also, force=force, dry_run=dry_run)
    verification = verify(output, source, plan) if check and not dry_run else None
    return Applied(plan, report, verification)


def _source_of(plan: PruningPlan, model: str | Path | None) -> ModelSource:
    """The location of a plan's model: the user's, otherwise the plan's hint or its name."""
    hint = plan.model.path
    if model is None and hint is not None and (hint / "config.json").is_file():
        return replace(resolve(os.path.relpath(hint)), name=plan.model.name)
    refuse_made_up(plan)
    try:
        return resolve(str(model or plan.model.name))
    except ModelError as error:
        if model:
            raise
        where = "" if hint is None else f", and is no longer in {os.path.relpath(hint)}"
        raise ModelError(
            f"The plan's model '{plan.model.name}' is neither an alias nor a directory here"
            f"{where}.",
            remedy="Give its location with --model.",
        ) from error
