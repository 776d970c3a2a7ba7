"""What ``yopo bench`` measured, and beside it what the plan predicts.

Every figure has a bound. Prefill can at best follow the FLOPs; a decode step can at best follow
the bytes that it must read (weights and cache); the visual KV cache is what the plan says, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

import torch

from yopo.evaluation.rivals import settings as rivals
from yopo.evaluation.rivals.settings import Setting
from yopo.flops import (
    dense_prefill_flops,
    dense_visual_kv_bytes,
    prefill_flops,
    visual_budget,
    visual_kv_bytes,
)
from yopo.plan import ModelShape, Plan

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        runs: Counted rounds of dense, pruned and rivals.
        warmup: Uncounted rounds in front.
        decode_steps: Decode steps behind each prefill; 0 skips decoding.
        threads: CPU threads of torch; None: as they are.
        rivals: What else is timed at the plan's visual budget, names of ``rivals.settings``.
        may_leave_out: Whether a rival that cannot run is left out instead of an error.
        contexts: Prompt lengths at which decode steps are timed as well.
    """

    runs: int = 7
    warmup: int = 1
    decode_steps: int = 8
    threads: int | None = None
    rivals: tuple[str, ...] = ()
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
class Contender:
    """One way to run the model, beside the dense one.

    Attributes:
        prefill: Embedding, merging and text decoder, ms per batch; the image is encoded already.
        decode: Text decoder, ms per step behind that prompt; None if skipped.
        peak_memory: Bytes above the weights during prefill; None if not measured.
        visual_kv: Bytes of visual keys and values found in the cache.
    """

    prefill: Compared
    decode: Compared | None
    peak_memory: int | None
    visual_kv: int


@dataclass(frozen=True)
class AtContext:
    """Decode steps behind a prompt of another length.

    Attributes:
        context: Tokens of the prompt.
        decode: What each contender's step took, beside the dense one's.
        plan: The plan for that prompt.
    """

    context: int
    decode: dict[str, Compared | None]
    plan: Plan


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
        measured: Dense, pruned and rivals, by name.
        settings: What the rivals did, by name, on the layers that ran.
        left_out: Why rivals are missing, by name.
        contexts: Decode steps behind longer prompts.
        memory_by: How peak memory is measured; None if it is not.
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
    measured: dict[str, Contender]
    settings: dict[str, Setting]
    left_out: dict[str, str]
    contexts: tuple[AtContext, ...]
    memory_by: str | None

    @property
    def prefill(self) -> Compared:
        """Prefill, pruned beside dense."""
        return self.measured[PRUNED].prefill

    @property
    def decode(self) -> Compared | None:
        """Decode steps, pruned beside dense; None if skipped."""
        return self.measured[PRUNED].decode

    @property
    def peak_memory(self) -> tuple[int, int] | None:
        """(dense, pruned) bytes above the weights during prefill; None if not measured."""
        peaks = (self.measured[DENSE].peak_memory, self.measured[PRUNED].peak_memory)
        return None if None in peaks else peaks

    @property
    def visual_kv(self) -> tuple[int, int]:
        """(dense, pruned) bytes of visual keys and values found in the caches."""
        return self.measured[DENSE].visual_kv, self.measured[PRUNED].visual_kv

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
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
        """Prefill time ratio over FLOPs ratio; 1.0 is the bound."""
        return self.prefill.ratio.median / self.flops_ratio

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
        return self.batch * rivals.prefill_flops(self.settings[name], shape, workload)

    def flops_ratio_of(self, name: str) -> float:
        """Prefill FLOPs over the dense model's."""
        return self.flops_of(name) / self.flops_of(DENSE)

    def visual_budget_of(self, name: str) -> float:
        """Visual FLOPs over the dense model's, on the layers that ran."""
        if name == DENSE:
            return 1.0
        if name == PRUNED:
            return visual_budget(self.plan)
        return rivals.reached(self.settings[name], self.plan.model.shape, self.plan.workload)

    def planned_kv_of(self, name: str) -> int:
        """Visual KV bytes in closed form, of the batch that ran."""
        shape, workload, size = self.plan.model.shape, self.plan.workload, self.itemsize
        if name == DENSE:
            return self.batch * dense_visual_kv_bytes(shape, workload, size)
        if name == PRUNED:
            return self.batch * visual_kv_bytes(self.plan, size)
        return self.batch * rivals.visual_kv_bytes(self.settings[name], shape, workload, size)

    def prefill_bound_of(self, name: str) -> float:
        """Share of the possible speed that prefill reaches: FLOPs ratio over time ratio."""
        return self.flops_ratio_of(name) / self.measured[name].prefill.ratio.median

    def bytes_ratio_of(self, name: str, plan: Plan | None = None) -> float:
        """Bytes that a decode step reads (weights and cache), over the dense model's.

        Args:
            name: Of a contender.
            plan: With another prompt than the one that ran first.
        """
        workload = (plan or self.plan).workload
        fixed = step_bytes(self.plan.model.shape, workload.text, self.batch, self.itemsize)
        return (fixed + self.planned_kv_of(name)) / (fixed + self.planned_kv_of(DENSE))

    def decode_bound_of(self, name: str) -> float | None:
        """Share of the possible speed that decoding reaches: bytes ratio over time ratio."""
        decode = self.measured[name].decode
        return None if decode is None else self.bytes_ratio_of(name) / decode.ratio.median

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
            "contenders": {name: self._contender(name) for name in self.measured},
            "left_out": self.left_out,
            "contexts": [self._context(each) for each in self.contexts],
        }

    def _contender(self, name: str) -> dict[str, Any]:
        found = self.measured[name]
        return {
            "setting": asdict(self.settings[name]) if name in self.settings else None,
            "visual_budget": self.visual_budget_of(name),
            "prefill_flops_ratio": self.flops_ratio_of(name),
            "prefill_ms": asdict(found.prefill.pruned),
            "prefill_time_ratio": asdict(found.prefill.ratio),
            "prefill_share_of_bound": self.prefill_bound_of(name),
            "decode_ms_per_token": found.decode and asdict(found.decode.pruned),
            "decode_time_ratio": found.decode and asdict(found.decode.ratio),
            "decode_bytes_ratio": self.bytes_ratio_of(name),
            "decode_share_of_bound": self.decode_bound_of(name),
            "peak_bytes_above_weights": found.peak_memory,
            "visual_kv_bytes": found.visual_kv,
            "planned_visual_kv_bytes": self.planned_kv_of(name),
        }

    def _context(self, at: AtContext) -> dict[str, Any]:
        return {
            "context": at.context,
            "decode": {
                name: {
                    "ms_per_token": decode and asdict(decode.pruned),
                    "time_ratio": decode and asdict(decode.ratio),
                    "bytes_ratio": self.bytes_ratio_of(name, at.plan),
                }
                for name, decode in at.decode.items()
            },
        }


def step_bytes(shape: ModelShape, text: int, batch: int, itemsize: int) -> int:
    """Bytes that a decode step reads in any case: the layers' weights, keys and values of text."""
    query_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = 2 * shape.hidden * (query_width + kv_width) + 3 * shape.hidden * shape.ffn
    return shape.layers * itemsize * (weights + 2 * batch * text * kv_width)
