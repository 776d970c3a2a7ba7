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
from yopo.checkpoint.reader import fetch
from yopo.console import note
from yopo.evaluation.evaluate import Evaluation, evaluate
from yopo.evaluation.fidelity import compare, record_dense
from yopo.families.registry import resolve
from yopo.plan import Plan
from yopo.plan_tensors import PlanTensors, read_plan_with_tensors
from yopo.planning.planner import Candidate, make_plan
from yopo.planning.wishes import Wishes
from yopo.runtime.install import pruned
from yopo.serving import load_dense, read_baked_plan, torch_dtype


@dataclass(frozen=True)
class RunOptions:
    """How a model is run over pairs.

    Attributes:
        data: Pairs (see ``open_pairs``); None: the package's own.
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
    pairs = _open(options)
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


def _open(options: RunOptions) -> Pairs:
    if options.data is None:
        note(
            "Using the demo pairs that come with yopo (shapes on a plane): "
            "your own pairs (--data) give a better plan."
        )
    return open_pairs(options.data, samples=options.samples, seed=options.seed)


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
    if target != "-" and Path(target).is_dir():
        plan, tensors = read_baked_plan(target)
        source = resolve(str(target))
    else:
        plan, tensors = read_plan_with_tensors(target)
        source = resolve(model_name or plan.model.name)
    pairs = _open(options)
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
