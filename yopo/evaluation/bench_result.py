"""What ``yopo bench`` measured, and beside it what the plan predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

import torch

from yopo.flops import dense_prefill_flops, prefill_flops, visual_budget, visual_kv_bytes
from yopo.plan import Plan


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        runs: Counted pairs.
        warmup: Uncounted pairs in front.
        decode_steps: Decode steps behind each prefill; 0 skips decoding.
        threads: CPU threads of torch; None: as they are.
    """

    runs: int = 7
    warmup: int = 1
    decode_steps: int = 8
    threads: int | None = None


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
    """Times of both models, pair by pair.

    Attributes:
        dense, pruned: Milliseconds.
        ratio: Pruned over dense.
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
    """Which of the plan's layers the timed model has.

    Attributes:
        total: Layers of the plan.
        used: The timed ones, as indices into the plan.
        plan_flops_ratio: Prefill FLOPs, pruned over dense, of the plan with all its layers.
    """

    total: int
    used: tuple[int, ...]
    plan_flops_ratio: float


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and beside it what the plan predicts.

    Attributes:
        plan: What ran: these layers, this prompt.
        layers: How they relate to the plan that was asked for.
        weights: ``random``, or where they come from.
        stand_in: Whether the timed decoder is of another family than the plan.
        options: How it was measured.
        batch, device, dtype, threads: On what.
        prefill: Embedding, merging and text decoder, ms per batch; the image is encoded already.
        decode: Text decoder, ms per step behind that prompt; None if skipped.
        peak_memory: (dense, pruned) bytes above the weights during prefill; None if not measured.
        memory_by: How; None if not measured.
        visual_kv: (dense, pruned) bytes of visual keys and values found in the caches.
    """

    plan: Plan
    layers: Layers
    weights: str
    stand_in: bool
    options: BenchOptions
    batch: int
    device: str
    dtype: str
    threads: int
    prefill: Compared
    decode: Compared | None
    peak_memory: tuple[int, int] | None
    memory_by: str | None
    visual_kv: tuple[int, int]

    @property
    def flops(self) -> tuple[int, int]:
        """(dense, pruned) prefill FLOPs of the batch that ran, by ``flops.py``."""
        shape, workload = self.plan.model.shape, self.plan.workload
        dense = dense_prefill_flops(shape, workload)
        return self.batch * dense, self.batch * prefill_flops(self.plan)

    @property
    def flops_ratio(self) -> float:
        """Prefill FLOPs, pruned over dense."""
        dense, after = self.flops
        return after / dense

    @property
    def over_bound(self) -> float:
        """Prefill time ratio over FLOPs ratio; 1.0 is the bound."""
        return self.prefill.ratio.median / self.flops_ratio

    @property
    def planned_kv(self) -> int:
        """Visual KV bytes that the plan predicts for the batch that ran."""
        return self.batch * visual_kv_bytes(self.plan, getattr(torch, self.dtype).itemsize)

    def to_dict(self) -> dict[str, Any]:
        """Everything a machine wants to know, as plain values."""
        dense_flops, pruned_flops = self.flops
        workload, memory = self.plan.workload, self.peak_memory
        return {
            "model": self.plan.model.name,
            "weights": self.weights,
            "stand_in": self.stand_in,
            "plan": dict(self.plan.provenance),
            "visual_budget": visual_budget(self.plan),
            "shape": asdict(self.plan.model.shape),
            "layers": asdict(self.layers),
            "prompt": {
                "visual": workload.visual,
                "text": workload.text,
                "text_before": workload.text_before,
                "grids": [[grid.rows, grid.cols] for grid in workload.grids],
                "batch": self.batch,
            },
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "options": asdict(self.options),
            "prefill_ms": asdict(self.prefill),
            "prefill_flops": {
                "dense": dense_flops,
                "pruned": pruned_flops,
                "ratio": self.flops_ratio,
            },
            "time_ratio_over_flops_ratio": self.over_bound,
            "decode_ms_per_token": None if self.decode is None else asdict(self.decode),
            "peak_bytes_above_weights": None
            if memory is None
            else {"dense": memory[0], "pruned": memory[1], "measured_by": self.memory_by},
            "visual_kv_bytes": {
                "dense": self.visual_kv[0],
                "pruned": self.visual_kv[1],
                "planned": self.planned_kv,
            },
        }
