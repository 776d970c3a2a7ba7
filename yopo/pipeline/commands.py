"""What the commands do: one function each, everything a command needs in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from yopo.calibration.statistics import Statistics, load_statistics
from yopo.checkpoint.bake import BakeReport, bake
from yopo.checkpoint.reader import Checkpoint, fetch
from yopo.data.prompts import load_processor
from yopo.evaluation.evaluate import Evaluation, evaluate
from yopo.models.registry import ModelSource, is_hub_id, resolve
from yopo.pipeline.session import (
    Calibrated,
    CalibrationSession,
    FitOptions,
    RunOptions,
    open_demo_or,
)
from yopo.pipeline.verification import Verification, verify
from yopo.planning.planner import make_plan
from yopo.planning.request import (
    BudgetRequest,
    LatencyRequest,
    PaperRequest,
    PlanRequest,
    ToleranceRequest,
)
from yopo.plans.schema import PruningPlan
from yopo.plans.storage import read_plan
from yopo.serving.loading import load_dense, open_baked, torch_dtype
from yopo.support.errors import ModelError, PlanError

Keep = Callable[[Statistics], None]


def calibrate(
    model_name: str,
    request: PlanRequest,
    options: RunOptions,
    fit_options: FitOptions | None = None,
    *,
    keep: Keep | None = None,
) -> Calibrated:
    """Measure a model on pairs and plan its pruning.

    Args:
        model_name: Alias, directory or hub id.
        request: What is asked of the plan.
        options: Data and how to run it.
        fit_options: On what plans are measured and fitted.
        keep: Given the statistics as soon as they exist, before anything is planned or fitted.

    Raises:
        YopoError: Unknown model, unreadable data, a request that cannot be met, ...
    """
    session = CalibrationSession(
        model_name,
        options,
        fit_options or FitOptions(),
        needs_holdout=isinstance(request, ToleranceRequest),
        compares=not isinstance(request, PaperRequest),
    )
    if keep is not None:
        keep(session.statistics)
    return session.make(request)


def calibrate_front(
    model_name: str,
    requests: Sequence[BudgetRequest],
    options: RunOptions,
    fit_options: FitOptions | None = None,
    *,
    keep: Keep | None = None,
) -> Iterator[Calibrated]:
    """Measure a model once and yield a plan for every budget, largest first.

    The plans share their neuron order, so one baked checkpoint serves them all.

    Raises:
        YopoError: As for ``calibrate``.
    """
    session = CalibrationSession(model_name, options, fit_options or FitOptions())
    if keep is not None:
        keep(session.statistics)
    for request in sorted(requests, key=lambda each: -each.budget):
        yield session.make(request)


def plan_from_statistics(path: str | Path, request: PlanRequest) -> Calibrated:
    """Make another plan from saved statistics, without the model.

    Raises:
        YopoError: The file holds no statistics, or the request cannot be met.
    """
    if isinstance(request, (ToleranceRequest, LatencyRequest)):
        raise PlanError(
            "A tolerance and a budget in milliseconds need the model.",
            remedy="Use `yopo calibrate`.",
        )
    statistics = load_statistics(path)
    plan, candidates = make_plan(statistics, request)
    return Calibrated(plan, statistics, candidates)


def evaluate_target(
    target: str,
    options: RunOptions,
    *,
    model_name: str | None = None,
    timing_runs: int = 15,
    budget: float | None = None,
) -> Evaluation:
    """Evaluate a baked checkpoint, or a plan on the model that it was made for.

    Args:
        target: What ``apply`` wrote (a directory or hub id), or a plan file, or ``-``.
        options: Data and how to run it.
        model_name: The dense model, if it is elsewhere than the plan says.
        timing_runs: Paired prefill runs; 0 skips timing.
        budget: Which of a checkpoint's plans (see ``yopo.load``); None: the first.

    Raises:
        YopoError: Anything that the model, the plan or the data lack.
    """
    plan = read_target(target, budget)
    source = source_of_target(target, plan, model_name)
    checkpoint = Checkpoint.open(fetch(source))  # before anything takes long
    pairs = open_demo_or(options, plan.model.name, "heldout")
    processor = load_processor(str(checkpoint.path), trust_remote_code=options.trust_remote_code)
    model = load_dense(source, checkpoint=checkpoint, dtype=torch_dtype(options.dtype))
    model = model.to(options.device)
    return evaluate(
        model,
        processor,
        plan,
        pairs,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        timing_runs=timing_runs,
        total=pairs.total,
    )


def read_target(target: str, budget: float | None = None) -> PruningPlan:
    """The plan of a baked checkpoint (directory or hub id), of a plan file, or of stdin for ``-``.

    Raises:
        PlanError: A budget for what is no checkpoint.
    """
    if _is_checkpoint(target):
        baked = open_baked(target, budget)
        return baked.plan
    if budget is not None:
        raise PlanError(f"{target}: is one plan; a budget chooses among a checkpoint's.")
    return read_plan(target)


def source_of_target(target: str, plan: PruningPlan, model_name: str | None) -> ModelSource:
    """Where the dense model of a target is: a checkpoint is its own, a plan names its model."""
    return resolve(target) if _is_checkpoint(target) else _source_of(plan, model_name)


def _is_checkpoint(target: str) -> bool:
    if target == "-" or Path(target).is_file() or Path(target).suffix in (".yaml", ".yml"):
        return False
    return Path(target).is_dir() or is_hub_id(target)


@dataclass(frozen=True)
class Applied:
    """What ``apply_plan`` did: the plan, the bake's report, the verification if asked for."""

    plan: PruningPlan
    report: BakeReport
    verification: Verification | None


def apply_plan(
    target: str,
    *others: str,
    output: str | Path | None = None,
    model_name: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    check: bool = False,
) -> Applied:
    """Bake a plan, or several for one model, into a copy of the model's checkpoint.

    Args:
        target: A plan file, or ``-``.
        others: Plan files of other budgets, for ``yopo.load(directory, budget=...)``.
        output: The directory to make; None: ``NAME-yopo`` in the working directory.
        model_name: The checkpoint, if it is elsewhere than the plan says.
        force: Whether a checkpoint in ``output`` may be replaced.
        dry_run: Validate everything, write nothing.
        check: Whether to open the result and compare it with the original.

    Raises:
        YopoError: Anything that the plan, the model or the output directory lack.
    """
    plan = read_plan(target)
    source = fetch(_source_of(plan, model_name))
    if output is None:
        output = f"{plan.model.name.partition('@')[0].rpartition('/')[2]}-yopo"
    also = [read_plan(each) for each in others]
    report = bake(plan, source, output, also=also, force=force, dry_run=dry_run)
    verification = verify(output, source, plan) if check and not dry_run else None
    return Applied(plan, report, verification)


def _source_of(plan: PruningPlan, model_name: str | None) -> ModelSource:
    """Where a plan's model is: where the user says, else where its name leads."""
    try:
        return resolve(model_name or plan.model.name)
    except ModelError as error:
        if model_name:
            raise
        raise ModelError(
            f"The plan's model '{plan.model.name}' is not an alias, nor a directory here.",
            remedy="Say where it is with --model.",
        ) from error
