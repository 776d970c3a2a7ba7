"""What the commands do: one function each, everything a command needs in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from yopo import __version__
from yopo.calibration.pairs import Pairs
from yopo.calibration.prompts import load_processor
from yopo.calibration.run import measure
from yopo.calibration.sources import open_pairs
from yopo.calibration.statistics import Statistics, load_statistics
from yopo.checkpoint.bake import BakeReport, bake
from yopo.checkpoint.reader import fetch
from yopo.console import note
from yopo.demo import demo_data
from yopo.errors import ModelError
from yopo.evaluation.evaluate import Evaluation, evaluate
from yopo.evaluation.fidelity import compare, record_dense
from yopo.families.registry import ModelSource, resolve
from yopo.plan import Plan
from yopo.plan_tensors import PlanTensors, read_plan_with_tensors
from yopo.planning.planner import Candidate, make_plan
from yopo.planning.wishes import Wishes
from yopo.runtime.install import pruned
from yopo.serving import load_dense, read_baked_plan, torch_dtype
from yopo.verification import Verification, verify


@dataclass(frozen=True)
class RunOptions:
    """How a model is run over pairs.

    Attributes:
        data: Pairs (see ``open_pairs``); None: the package's own, as `yopo.demo` has them for the
            model: its calibration set to calibrate, its held-out set to evaluate.
        samples: How many; None: all.
        seed: Decides which pairs are drawn.
        batch_size: Pairs per forward.
        device: Where the model runs (``cpu``, ``cuda``, ``cuda:1``, ``mps``).
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16``, ``float16``.
        max_new_tokens: Longest answer generated.
    """

    data: str | None = None
    samples: int | None = None
    seed: int = 0
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    max_new_tokens: int = 32


@dataclass(frozen=True)
class Calibrated:
    """What a calibration makes: the plan, its tensors, the statistics and the candidates."""

    plan: Plan
    tensors: PlanTensors
    statistics: Statistics
    candidates: list[Candidate] = field(default_factory=list)


def calibrate(
    model_name: str,
    wishes: Wishes,
    options: RunOptions,
    *,
    queries: str = "text",
    measure_pairs: int = 64,
) -> Calibrated:
    """Measure a model on pairs and plan its pruning.

    Args:
        model_name: Alias, directory or hub id.
        wishes: What the plan should look like.
        options: Data and how to run it.
        queries: Which queries head activity sums over.
        measure_pairs: Calibration pairs on which candidate plans are compared.

    Raises:
        YopoError: Unknown model, unreadable data, wishes that cannot be met, ...
    """
    source = resolve(model_name)
    pairs = _open(options, source.name, "calibration")
    processor = load_processor(str(fetch(source)))
    model = load_dense(source, dtype=torch_dtype(options.dtype)).to(options.device)
    about = {"yopo": __version__, "pairs": pairs.name, "seed": options.seed}
    if pairs.digest:
        about["pairs_digest"] = pairs.digest
    statistics = measure(
        model,
        processor,
        pairs,
        name=source.name,
        total=pairs.total,
        batch_size=options.batch_size,
        queries=queries,
        provenance=about,
    )
    judge = None
    if wishes.budget is not None:
        judge = _judge(model, processor, pairs, options, measure_pairs)
    return Calibrated(*_arrange(statistics, wishes, judge))


def plan_from_statistics(path: str | Path, wishes: Wishes) -> Calibrated:
    """Make another plan from saved statistics, without the model.

    Raises:
        YopoError: The file holds no statistics, or the wishes cannot be met.
    """
    return Calibrated(*_arrange(load_statistics(path), wishes, None))


def _arrange(statistics: Statistics, wishes: Wishes, judge: Callable | None) -> tuple:
    plan, tensors, candidates = make_plan(statistics, wishes, judge)
    return plan, tensors, statistics, candidates


def _open(options: RunOptions, model_name: str, split: str) -> Pairs:
    data = options.data
    if data is None:
        data = demo_data(model_name, split)
        if split == "calibration":
            note(
                f"Using the demo pairs that come with yopo ({data}): "
                "your own pairs (--data) give a better plan."
            )
    return open_pairs(data, samples=options.samples, seed=options.seed)


def _judge(model, processor, pairs: Pairs, options: RunOptions, count: int) -> Callable:
    """A function that measures a plan's logit KL to the dense model on the first pairs."""
    records = record_dense(
        model,
        processor,
        islice(pairs, count),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        total=min(count, pairs.total or count),
    )

    def judge(plan: Plan, tensors: PlanTensors) -> float:
        with pruned(model, plan, tensors, check=False):
            return compare(model, records).kl

    return judge


def evaluate_target(
    target: str, options: RunOptions, *, model_name: str | None = None, timing_runs: int = 15
) -> Evaluation:
    """Evaluate a baked checkpoint, or a plan on the model that it was made for.

    Args:
        target: A directory that ``apply`` wrote, or a plan file, or ``-``.
        options: Data and how to run it.
        model_name: The dense model, if it is elsewhere than the plan says.
        timing_runs: Paired prefill runs; 0 skips timing.

    Raises:
        YopoError: Anything that the model, the plan or the data lack.
    """
    plan, tensors = read_target(target)
    source = source_of_target(target, plan, model_name)
    pairs = _open(options, plan.model.name, "heldout")
    processor = load_processor(str(fetch(source)))
    model = load_dense(source, dtype=torch_dtype(options.dtype)).to(options.device)
    return evaluate(
        model,
        processor,
        plan,
        tensors,
        pairs,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        timing_runs=timing_runs,
        total=pairs.total,
    )


def read_target(target: str) -> tuple[Plan, PlanTensors | None]:
    """The plan of a baked checkpoint's directory, of a plan file, or of stdin for ``-``."""
    if _is_checkpoint(target):
        return read_baked_plan(target)
    return read_plan_with_tensors(target)


def source_of_target(target: str, plan: Plan, model_name: str | None) -> ModelSource:
    """Where the dense model of a target is: a checkpoint is its own, a plan names its model."""
    return resolve(target) if _is_checkpoint(target) else _source_of(plan, model_name)


def _is_checkpoint(target: str) -> bool:
    return target != "-" and Path(target).is_dir()


@dataclass(frozen=True)
class Applied:
    """What ``apply_plan`` did: the plan, the bake's report, the verification if asked for."""

    plan: Plan
    report: BakeReport
    verification: Verification | None


def apply_plan(
    target: str,
    output: str | Path | None = None,
    *,
    model_name: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    check: bool = False,
) -> Applied:
    """Bake a plan into a copy of its model's checkpoint.

    Args:
        target: A plan file, or ``-``.
        output: The directory to make; None: ``NAME-yopo`` in the working directory.
        model_name: The checkpoint, if it is elsewhere than the plan says.
        force: Whether a checkpoint in ``output`` may be replaced.
        dry_run: Validate everything, write nothing.
        check: Whether to open the result and compare it with the original.

    Raises:
        YopoError: Anything that the plan, the model or the output directory lack.
    """
    plan, tensors = read_plan_with_tensors(target)
    source = fetch(_source_of(plan, model_name))
    if output is None:
        output = f"{plan.model.name.partition('@')[0].rpartition('/')[2]}-yopo"
    report = bake(plan, tensors, source, output, force=force, dry_run=dry_run)
    verification = verify(output, source, plan, tensors) if check and not dry_run else None
    return Applied(plan, report, verification)


def _source_of(plan: Plan, model_name: str | None) -> ModelSource:
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
