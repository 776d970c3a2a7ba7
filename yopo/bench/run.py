"""``yopo bench``: does time follow the FLOPs? Dense against pruned, paired, in one process.

Each round prefills the same prompt with both models - and with baselines at the same budget - one
right after the other, in reversed order from round to round, then decodes a few tokens with each.
Results are medians with quartiles; ratios are medians of the rounds' own ratios to the dense model,
so a machine that slows down halfway does not distort them.
Comparisons use the same kernels: where a pruned prefill uses a faster kernel than transformers
(``runtime/gemm.py``), everything is timed on that kernel, and the stock model also on its own: the
gain of serving as shipped is a second figure. On a GPU, where pruned prefills are replayed from
CUDA graphs (``runtime/replay.py``), the dense model's are as well; baselines and stock have none.
The prefill ratio is reported with the ratio of the FLOPs that ``flops.py`` predicts for the same
prompt and layers: their quotient is 1.0 where time falls with the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from yopo.baselines.baseline import Baseline
from yopo.baselines.registry import solve_for
from yopo.bench.memory import measured_by, memory_to_time
from yopo.bench.plans import sampled_layers, with_layers, with_prompt
from yopo.bench.prompt import made_up_prompt, noise_prompt
from yopo.bench.random_model import fitted, grids_of, random_model
from yopo.bench.rates import best, measure_rates
from yopo.bench.result import (
    DENSE,
    PRUNED,
    STOCK,
    AtContext,
    Benchmark,
    BenchOptions,
    Contender,
    Layers,
)
from yopo.bench.rounds import Rounds, Sample
from yopo.bench.subject import Bench
from yopo.bench.visual_kv import refuse_unplanned
from yopo.models.devices import devices_of
from yopo.plans.flops import dense_prefill_flops, prefill_flops
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import check_model
from yopo.support.console import track
from yopo.support.errors import YopoError
from yopo.support.out_of_memory import narrower

RANDOM = "random"
"""What a benchmark calls weights that are made up."""


@dataclass(frozen=True)
class Sizes:
    """The prompts to time; None: the plan's own.

    Attributes:
        batch: Number of equal prompts per forward.
        visual, text: Tokens of one prompt.
    """

    batch: int = 1
    visual: int | None = None
    text: int | None = None


def run_rounds(subject: Bench, options: BenchOptions, *, label: str = "rounds") -> Rounds:
    """Measure rounds, each in the reversed order of the previous one."""
    samples: dict[str, list[Sample]] = {name: [] for name in subject.names}
    layers, prompt, rates = subject.model.get_decoder().layers, subject.prompt, []
    numbers = range(-options.warmup, options.runs)
    for number in track(numbers, label=label, total=len(numbers), unit="rounds"):
        for name in subject.names if number % 2 == 0 else reversed(subject.names):
            sample = subject.measure(name, options.decode_steps)
            if number >= 0:
                samples[name].append(sample)
        rates.append(measure_rates(layers, prompt.batch, prompt.length))
    return Rounds(samples, rates)


def bench_random(
    plan: PruningPlan,
    sizes: Sizes,
    options: BenchOptions,
    *,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Benchmark:
    """Time a plan on a model of its shape with random weights.

    Args:
        plan: Any plan; for families other than LLaVA, a Llama decoder of its shape is used.
        sizes: The sizes of the prompt.
        options: How to measure.
        num_layers: Decoder layers to time, sampled from the plan; None: all.
        dtype: Dtype of the weights.
        device: Device of the model.

    Raises:
        PlanError: The prompt does not form whole images, or the plan has fewer layers.
        ModelError: The weights would not fit into memory, or the pruned model's cache does not
            hold the visual bytes that the plan predicts.
    """
    moved = with_prompt(plan, visual=sizes.visual, text=sizes.text)
    used = sampled_layers(moved, num_layers or len(moved.layers))
    few = fitted(with_layers(moved, used))
    model = random_model(few.model.shape, dtype=dtype, device=device)
    prompt = made_up_prompt(model, few, sizes.batch)
    subject = Bench(model, few, prompt, grids_of(few))
    return _bench(
        subject,
        options,
        requested=moved,
        layers=Layers(len(plan.layers), used, _flops_ratio(moved)),
        weights=RANDOM,
        stand_in=few.model.family != plan.model.family,
    )


def bench_model(
    model: PreTrainedModel,
    plan: PruningPlan,
    sizes: Sizes,
    options: BenchOptions,
) -> Benchmark:
    """Time a plan on the model that it was made for; the model is restored afterwards.

    Raises:
        ModelError: The plan was made for another model, the visual tokens do not form whole images
            of it, or the pruned model's cache does not hold the visual bytes that the plan
            predicts.
    """
    check_model(model, plan, check=True)
    moved = with_prompt(plan, text=sizes.text)
    prompt, moved = noise_prompt(model, moved, sizes.batch, visual=sizes.visual)
    layers = Layers(len(plan.layers), tuple(range(len(plan.layers))), _flops_ratio(moved))
    subject = Bench(model, moved, prompt)
    return _bench(
        subject, options, requested=moved, layers=layers, weights="checkpoint", stand_in=False
    )


def _flops_ratio(plan: PruningPlan) -> float:
    return prefill_flops(plan) / dense_prefill_flops(plan.model.shape, plan.workload)


def _bench(
    subject: Bench,
    options: BenchOptions,
    *,
    requested: PruningPlan,
    layers: Layers,
    weights: str,
    stand_in: bool,
) -> Benchmark:
    narrow = narrower(subject.model.dtype.itemsize)
    where = "fewer --layers" if weights == RANDOM else "--device-map auto"
    with _threads(options.threads), memory_to_time(subject.prompt, narrow, where):
        subject, left_out = _with_baselines(subject, options, requested, layers.used)
        model, devices = subject.model, devices_of(subject.model)
        held = subject.visual_kv(PRUNED)
        refuse_unplanned(held, subject.plan, subject.prompt.batch, model.dtype.itemsize)
        rounds = run_rounds(subject, options)
        measured = {
            name: Contender(
                prefill=rounds.prefill(name),
                decode=rounds.decode(name),
                peak_memory=subject.peak(name),
                visual_kv=subject.visual_kv(name),
            )
            for name in subject.names
            if name != STOCK
        }
        return Benchmark(
            plan=subject.plan,
            layers=layers,
            weights=weights,
            stand_in=stand_in,
            options=options,
            batch=subject.prompt.batch,
            device=", ".join(map(str, devices)),
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            measured=measured,
            baselines=dict(subject.baselines),
            left_out=left_out,
            contexts=tuple(_at_context(subject, options, each) for each in options.contexts),
            memory_by=measured_by(*devices),
            rates=best(rounds.rates),
            shipped=rounds.shipped(),
            cuda_graphs=rounds.are_replayed(DENSE, PRUNED),
        )


def _with_baselines(
    subject: Bench, options: BenchOptions, requested: PruningPlan, used: Sequence[int]
) -> tuple[Bench, dict[str, str]]:
    """Add the baselines at the plan's visual budget; also returns why some are left out."""
    methods: dict[str, Baseline] = {}
    left_out: dict[str, str] = {}
    for name in options.baselines:
        try:
            method = solve_for(name, requested).on_layers(used)
            with replace(subject, baselines={name: method}).switch(name):
                methods[name] = method
        except YopoError as error:
            if not options.may_leave_out:
                raise
            left_out[name] = error.message
    return replace(subject, baselines=methods), left_out


def _at_context(subject: Bench, options: BenchOptions, context: int) -> AtContext:
    longer = subject.lengthened(context)
    rounds = run_rounds(longer, options, label=f"context {context}")
    steps = {name: rounds.decode(name) for name in longer.names if name != STOCK}
    timed = {name: each for name, each in steps.items() if each is not None}
    return AtContext(context, timed, longer.plan)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
