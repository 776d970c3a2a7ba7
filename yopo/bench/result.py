"""The measurements of ``yopo bench``, and what the plan predicts.

Every figure has a bound. Prefill can at best run all its FLOPs as fast as the machine runs a plain
product with as many rows; a decode step can at best read its bytes (weights and cache) as fast as
the machine reads weights; the visual KV cache is exactly what the plan predicts. Both rates are
measured between the rounds, on the kernels of the contenders: a share of a bound above 1 means that
something is wrong with the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

import torch

from yopo.baselines.baseline import Baseline
from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_kv_bytes,
    prefill_flops,
    visual_budget,
    visual_kv_bytes,
)
from yopo.plans.schema import ModelShape, PruningPlan

DENSE, PRUNED = "dense", "pruned"
"""Both on the kernels of a pruned model."""

STOCK = "stock"
"""The dense model as transformers runs it, where that differs."""

TOLERANCE = 1.03
"""Share of a bound above which it counts as exceeded: rates are measured with some noise."""


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        runs: Counted rounds of dense, pruned and baselines.
        warmup: Uncounted rounds before those.
        decode_steps: Decode steps after each prefill; 0 skips decoding.
        threads: CPU threads of torch; None: unchanged.
        baselines: Names of baselines in the registry, also timed at the plan's visual budget.
        may_leave_out: Whether a baseline that cannot run is left out instead of raising an error.
        contexts: Additional prompt lengths at which decode steps are timed.
    """

    runs: int = 7
    warmup: int = 1
    decode_steps: int = 8
    threads: int | None = None
    baselines: tuple[str, ...] = ()
    may_leave_out: bool = False
    contexts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass(frozen=True)
class Compared:
    """Times of the dense model and of another contender, round by round.

    Attributes:
        dense, pruned: Milliseconds; ``pruned`` are the other contender's.
        ratio: The other's over the dense model's.
    """

    dense: Spread
    pruned: Spread
    ratio: Spread

    @classmethod
    def of(cls, dense: Sequence[float], pruned: Sequence[float]) -> Compared:
        """Summarise pairs."""
        ratios = [after / before for before, after in zip(dense, pruned, strict=True)]
        return cls(Spread.of(dense), Spread.of(pruned), Spread.of(ratios))


@dataclass(frozen=True)
class Layers:
    """The layers of the plan that the timed model has.

    Attributes:
        total: Layers of the plan.
        used: The timed ones, as indices into the plan.
        plan_flops_ratio: Prefill FLOPs, pruned over dense, of the plan with all its layers.
    """

    total: int
    used: tuple[int, ...]
    plan_flops_ratio: float


@dataclass(frozen=True)
class Contender:
    """One way to run the model, compared with the dense one.

    Attributes:
        prefill: Embedding, merging and text decoder, ms per batch; the image is already encoded.
        decode: Text decoder, ms per step after that prompt; None if skipped.
        peak_memory: Bytes above the weights during prefill; None if not measured.
        visual_kv: Bytes of visual keys and values found in the cache.
    """

    prefill: Compared
    decode: Compared | None
    peak_memory: int | None
    visual_kv: int


@dataclass(frozen=True)
class Shipped:
    """Pruned serving compared with stock transformers, each on its own kernels.

    Attributes:
        prefill: Milliseconds; its ``dense`` is the stock model.
        decode: Milliseconds per step; None if skipped.
    """

    prefill: Compared
    decode: Compared | None


@dataclass(frozen=True)
class Rates:
    """The machine's best rates, measured between the rounds.

    Attributes:
        flops: FLOPs per millisecond of a product with as many rows as the prompts have tokens.
        bytes: Bytes per millisecond of weights that a product of one row per prompt reads.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class AtContext:
    """Decode steps after a prompt of another length.

    Attributes:
        context: Tokens of the prompt.
        decode: Each contender's time per step, compared with the dense one's.
        plan: The plan for that prompt.
    """

    context: int
    decode: dict[str, Compared]
    plan: PruningPlan


@dataclass(frozen=True)
class Benchmark:
    """The measurements, and what the plan predicts.

    Attributes:
        plan: The plan that ran: its layers and prompt.
        layers: How they relate to the requested plan.
        weights: ``random``, or their source.
        stand_in: Whether the timed decoder is of another family than the plan.
        options: How it was measured.
        batch, device, dtype, threads: What it was measured on.
        measured: Dense, pruned and baselines, by name.
        baselines: The baselines with their parameters, by name, on the layers that ran.
        left_out: Why baselines are missing, by name.
        contexts: Decode steps after longer prompts.
        memory_by: How peak memory is measured; None if it is not.
        rates: The rates that bounds are computed from.
        shipped: Pruned compared with stock; None if both run on the same kernels anyway.
        cuda_graphs: Whether prefills of dense and pruned were replayed from CUDA graphs.
    """

    plan: PruningPlan
    layers: Layers
    weights: str
    stand_in: bool
    options: BenchOptions
    batch: int
    device: str
    dtype: str
    threads: int
    measured: dict[str, Contender]
    baselines: dict[str, Baseline]
    left_out: dict[str, str]
    contexts: tuple[AtContext, ...]
    memory_by: str | None
    rates: Rates
    shipped: Shipped | None
    cuda_graphs: bool

    @property
    def prefill(self) -> Compared:
        """Prefill, pruned compared with dense."""
        return self.measured[PRUNED].prefill

    @property
    def decode(self) -> Compared | None:
        """Decode steps, pruned compared with dense; None if skipped."""
        return self.measured[PRUNED].decode

    @property
    def peak_memory(self) -> tuple[int, int] | None:
        """(dense, pruned) bytes above the weights during prefill; None if not measured."""
        dense, pruned = self.measured[DENSE].peak_memory, self.measured[PRUNED].peak_memory
        return None if dense is None or pruned is None else (dense, pruned)

    @property
    def visual_kv(self) -> tuple[int, int]:
        """(dense, pruned) bytes of visual keys and values found in the caches."""
        return self.measured[DENSE].visual_kv, self.measured[PRUNED].visual_kv

    @property
    def itemsize(self) -> int:
        """Bytes per number."""
        return getattr(torch, self.dtype).itemsize

    @property
    def flops(self) -> tuple[int, int]:
        """(dense, pruned) prefill FLOPs of the batch that ran, by ``flops.py``."""
        return self.flops_of(DENSE), self.flops_of(PRUNED)

    @property
    def flops_ratio(self) -> float:
        """Prefill FLOPs, pruned over dense."""
        return self.flops_ratio_of(PRUNED)

    @property
    def over_bound(self) -> float:
        """Prefill time ratio over FLOPs ratio, same kernels; 1.0: time falls with the work."""
        return self.prefill.ratio.median / self.flops_ratio

    @property
    def over_bound_as_shipped(self) -> float:
        """That quotient against the stock model, which includes the gain of another kernel."""
        if self.shipped is None:
            return self.over_bound
        return self.shipped.prefill.ratio.median / self.flops_ratio

    @property
    def off(self) -> dict[str, float]:
        """Shares above what is physically possible, by measurement: these are wrong."""
        shares = {}
        for name in self.measured:
            shares[f"{name} prefill"] = self.prefill_bound_of(name)
            shares[f"{name} decode"] = self.decode_bound_of(name) or 0.0
        return {what: share for what, share in shares.items() if share > TOLERANCE}

    @property
    def planned_kv(self) -> int:
        """Visual KV bytes that the plan predicts for the batch that ran."""
        return self.planned_kv_of(PRUNED)

    def flops_of(self, name: str) -> int:
        """Prefill FLOPs of the batch, text included, in closed form."""
        shape, workload = self.plan.model.shape, self.plan.workload
        if name == DENSE:
            return self.batch * dense_prefill_flops(shape, workload)
        if name == PRUNED:
            return self.batch * prefill_flops(self.plan)
        return self.batch * self.baselines[name].prefill_flops(shape, workload)

    def flops_ratio_of(self, name: str) -> float:
        """Prefill FLOPs over the dense model's."""
        return self.flops_of(name) / self.flops_of(DENSE)

    def visual_budget_of(self, name: str) -> float:
        """Visual FLOPs over the dense model's, on the layers that ran."""
        if name == DENSE:
            return 1.0
        if name == PRUNED:
            return visual_budget(self.plan)
        return self.baselines[name].reached(self.plan.model.shape, self.plan.workload)

    def planned_kv_of(self, name: str) -> int:
        """Visual KV bytes in closed form, of the batch that ran."""
        shape, workload, size = self.plan.model.shape, self.plan.workload, self.itemsize
        if name == DENSE:
            return self.batch * dense_visual_kv_bytes(shape, workload, size)
        if name == PRUNED:
            return self.batch * visual_kv_bytes(self.plan, size)
        return self.batch * self.baselines[name].visual_kv_bytes(shape, workload, size)

    def prefill_bound_of(self, name: str) -> float:
        """Share of the possible speed that prefill reaches, given its FLOPs."""
        return self.flops_of(name) / self.rates.flops / self.measured[name].prefill.pruned.median

    def bytes_of(self, name: str, plan: PruningPlan | None = None) -> int:
        """Bytes that a decode step reads: weights and cache.

        Args:
            name: Name of a contender.
            plan: A plan with another prompt than the main one; None: the main one.
        """
        workload = (plan or self.plan).workload
        fixed = step_bytes(self.plan.model.shape, workload.text, self.batch, self.itemsize)
        return fixed + self.planned_kv_of(name)

    def bytes_ratio_of(self, name: str, plan: PruningPlan | None = None) -> float:
        """Bytes that a decode step reads over the dense model's."""
        return self.bytes_of(name, plan) / self.bytes_of(DENSE, plan)

    def decode_bound_of(self, name: str) -> float | None:
        """Share of the possible speed that decoding reaches, given its bytes."""
        decode = self.measured[name].decode
        return (
            None
            if decode is None
            else self.bytes_of(name) / self.rates.bytes / decode.pruned.median
        )


def step_bytes(shape: ModelShape, text: int, batch: int, itemsize: int) -> int:
    """Bytes that every decode step reads: the layers' weights, keys and values of text."""
    query_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = 2 * shape.hidden * (query_width + kv_width) + 3 * shape.hidden * shape.ffn
    return shape.layers * itemsize * (weights + 2 * batch * text * kv_width)
