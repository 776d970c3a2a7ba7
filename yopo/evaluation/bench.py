"""``yopo bench``: does time follow the FLOPs? Dense against pruned, paired, in one process.

Each pair prefills the same prompt with both models, one right behind the other and the order
swapped from pair to pair, then decodes a few tokens with each. Medians with quartiles; ratios are
medians of the pairs' own ratios, so that a machine that slows down half-way does not bend them.
Beside the prefill ratio stands the ratio of the FLOPs that ``flops.py`` predicts for the very
prompt and layers that ran: their quotient is 1.0 where all the saved work is saved time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from yopo.console import track
from yopo.evaluation.bench_memory import measured_by, peak_bytes
from yopo.evaluation.bench_plan import sampled_layers, with_layers, with_prompt
from yopo.evaluation.bench_prompt import Prompt, made_up_prompt, noise_prompt
from yopo.evaluation.bench_result import Benchmark, BenchOptions, Compared, Layers
from yopo.evaluation.random_model import fitted, grids_of, random_model
from yopo.evaluation.timing import Switch
from yopo.families.family import GridsOf
from yopo.flops import dense_prefill_flops, prefill_flops
from yopo.plan import Plan
from yopo.plan_tensors import PlanTensors
from yopo.runtime.install import check_model, pruned


@dataclass(frozen=True)
class Sizes:
    """The prompts to time; None: the plan's own.

    Attributes:
        batch: Equal prompts per forward.
        visual, text: Tokens of one prompt.
    """

    batch: int = 1
    visual: int | None = None
    text: int | None = None


@dataclass(frozen=True)
class Bench:
    """A model, a plan and a prompt, to be measured.

    Attributes:
        model: Dense, in memory.
        plan: For this model and this prompt.
        tensors: The plan's.
        prompt: What is prefilled.
        grids_of: Locates images where the model's own rule does not (made-up features).
    """

    model: PreTrainedModel
    plan: Plan
    tensors: PlanTensors | None
    prompt: Prompt
    grids_of: GridsOf | None = None

    def switch(self, is_pruned: bool) -> Switch:
        """The context in which one of the two models runs."""
        if not is_pruned:
            return nullcontext()
        return pruned(self.model, self.plan, self.tensors, grids_of=self.grids_of, check=False)

    @torch.no_grad()
    def prefill(self) -> Cache:
        """Prefill with the model as it is; returns the cache."""
        return self.model.base_model(**self.prompt.arguments(), use_cache=True).past_key_values

    def now(self) -> float:
        """Milliseconds, everything queued on the device done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return 1e3 * time.perf_counter()

    def measure(self, is_pruned: bool, decode_steps: int) -> Sample:
        """One prefill and its decode steps with one of the two models."""
        with self.switch(is_pruned):
            started = self.now()
            cache = self.prefill()
            prefill_ms = self.now() - started
            return Sample(prefill_ms, self._decode(cache, decode_steps))

    @torch.no_grad()
    def _decode(self, cache: Cache, steps: int) -> float | None:
        """Median ms per step, or None without steps."""
        prompt, times = self.prompt, []
        ids = torch.full((prompt.batch, 1), prompt.next_token, device=self.model.device)
        for _ in range(steps):
            started = self.now()
            self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
            times.append(self.now() - started)
        return median(times) if times else None

    def peak(self, is_pruned: bool) -> int | None:
        """Peak bytes of a prefill above what is allocated before."""
        with self.switch(is_pruned):
            return peak_bytes(self.prefill, str(self.model.device))

    def visual_kv(self) -> tuple[int, int]:
        """Bytes of visual keys and values in the caches, (dense, pruned)."""
        cache, visual = self.prefill(), self.plan.workload.visual
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        del cache
        with self.switch(True):
            after = sum(layer.visual_bytes() for layer in self.prefill().layers)
        return held * visual // self.prompt.length, after


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one prefill, and per decode step behind it."""

    prefill: float
    decode: float | None


@dataclass
class Pairs:
    """Samples of both models, pair by pair."""

    dense: list[Sample] = field(default_factory=list)
    pruned: list[Sample] = field(default_factory=list)

    def compared(self, what: str) -> Compared:
        """Summarise ``prefill`` or ``decode``."""
        columns = ([getattr(each, what) for each in side] for side in (self.dense, self.pruned))
        return Compared.of(*columns)


def run_pairs(subject: Bench, options: BenchOptions) -> Pairs:
    """Measure pairs; which model comes first alternates."""
    pairs = Pairs()
    numbers = range(-options.warmup, options.runs)
    for number in track(numbers, label="pairs", total=len(numbers), unit="pairs"):
        for is_pruned in (False, True) if number % 2 == 0 else (True, False):
            sample = subject.measure(is_pruned, options.decode_steps)
            if number >= 0:
                (pairs.pruned if is_pruned else pairs.dense).append(sample)
    return pairs


def bench_random(
    plan: Plan,
    tensors: PlanTensors | None,
    sizes: Sizes,
    options: BenchOptions,
    *,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Benchmark:
    """Time a plan on a model of its shape with random weights.

    Args:
        plan: Any plan; of another family than LLaVA, a Llama decoder of its shape stands in.
        tensors: Its tensors.
        sizes: The prompt.
        options: How to measure.
        num_layers: Decoder layers to time, sampled from the plan; None: all.
        dtype: Of the weights.
        device: Where the model runs.

    Raises:
        PlanError: The prompt forms no whole images, or the plan has fewer layers.
        ModelError: The weights would not fit into memory.
    """
    moved = with_prompt(plan, visual=sizes.visual, text=sizes.text)
    used = sampled_layers(moved, num_layers or len(moved.layers))
    few, few_tensors = fitted(with_layers(moved, used), tensors, used)
    model = random_model(few.model.shape, dtype=dtype, device=device)
    prompt = made_up_prompt(model, few, sizes.batch)
    subject = Bench(model, few, few_tensors, prompt, grids_of(few))
    return _bench(
        subject,
        options,
        layers=Layers(len(plan.layers), used, _flops_ratio(moved)),
        weights="random",
        stand_in=few.model.family != plan.model.family,
    )


def bench_model(
    model: PreTrainedModel,
    plan: Plan,
    tensors: PlanTensors | None,
    sizes: Sizes,
    options: BenchOptions,
) -> Benchmark:
    """Time a plan on the model that it was made for; the model is as it was afterwards.

    Raises:
        ModelError: The model is not the plan's, or so many visual tokens are no whole images of it.
    """
    check_model(model, plan, check=True)
    moved = with_prompt(plan, text=sizes.text)
    prompt, moved = noise_prompt(model, moved, sizes.batch, visual=sizes.visual)
    layers = Layers(len(plan.layers), tuple(range(len(plan.layers))), _flops_ratio(moved))
    subject = Bench(model, moved, tensors, prompt)
    return _bench(subject, options, layers=layers, weights="checkpoint", stand_in=False)


def _flops_ratio(plan: Plan) -> float:
    return prefill_flops(plan) / dense_prefill_flops(plan.model.shape, plan.workload)


def _bench(
    subject: Bench, options: BenchOptions, *, layers: Layers, weights: str, stand_in: bool
) -> Benchmark:
    model, device = subject.model, str(subject.model.device)
    with _threads(options.threads):
        pairs = run_pairs(subject, options)
        peaks = (subject.peak(False), subject.peak(True))
        return Benchmark(
            plan=subject.plan,
            layers=layers,
            weights=weights,
            stand_in=stand_in,
            options=options,
            batch=subject.prompt.batch,
            device=device,
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            prefill=pairs.compared("prefill"),
            decode=pairs.compared("decode") if options.decode_steps else None,
            peak_memory=None if None in peaks else peaks,
            memory_by=measured_by(device),
            visual_kv=subject.visual_kv(),
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
