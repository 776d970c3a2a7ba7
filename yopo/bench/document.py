"""A benchmark as one JSON document.

Times are compared on the same kernels; ``as_shipped`` compares with stock transformers.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from yopo.bench.result import AtContext, Benchmark
from yopo.plans.flops import visual_budget


def document(found: Benchmark) -> dict[str, Any]:
    """All results as plain values."""
    dense_flops, pruned_flops = found.flops
    shipped = found.shipped
    decode = found.decode if shipped is None else shipped.decode
    workload, memory = found.plan.workload, found.peak_memory
    return {
        "model": found.plan.model.name,
        "weights": found.weights,
        "stand_in": found.stand_in,
        "plan": dict(found.plan.provenance),
        "visual_budget": visual_budget(found.plan),
        "shape": asdict(found.plan.model.shape),
        "layers": asdict(found.layers),
        "prompt": {
            "visual": workload.visual,
            "text": workload.text,
            "text_before": workload.text_before,
            "grids": [[grid.rows, grid.cols] for grid in workload.grids],
            "batch": found.batch,
        },
        "device": found.device,
        "dtype": found.dtype,
        "threads": found.threads,
        "cuda_graphs": found.cuda_graphs,
        "options": asdict(found.options),
        "prefill_ms": asdict(found.prefill),
        "prefill_flops": {
            "dense": dense_flops,
            "pruned": pruned_flops,
            "ratio": found.flops_ratio,
        },
        "time_ratio_over_flops_ratio": found.over_bound,
        "as_shipped": {
            "other_kernels": shipped is not None,
            "prefill_ms": asdict(found.prefill if shipped is None else shipped.prefill),
            "time_ratio_over_flops_ratio": found.over_bound_as_shipped,
            "decode_ms_per_token": None if decode is None else asdict(decode),
        },
        "rates": {
            "flops_per_second": 1e3 * found.rates.flops,
            "bytes_per_second": 1e3 * found.rates.bytes,
        },
        "shares_above_the_bound": found.off,
        "decode_ms_per_token": None if found.decode is None else asdict(found.decode),
        "peak_bytes_above_weights": None
        if memory is None
        else {"dense": memory[0], "pruned": memory[1], "measured_by": found.memory_by},
        "visual_kv_bytes": {
            "dense": found.visual_kv[0],
            "pruned": found.visual_kv[1],
            "planned": found.planned_kv,
        },
        "contenders": {name: _contender(found, name) for name in found.measured},
        "left_out": found.left_out,
        "contexts": [_context(found, each) for each in found.contexts],
    }


def _contender(benchmark: Benchmark, name: str) -> dict[str, Any]:
    found = benchmark.measured[name]
    return {
        "setting": benchmark.baselines[name].to_dict() if name in benchmark.baselines else None,
        "visual_budget": benchmark.visual_budget_of(name),
        "prefill_flops_ratio": benchmark.flops_ratio_of(name),
        "prefill_ms": asdict(found.prefill.pruned),
        "prefill_time_ratio": asdict(found.prefill.ratio),
        "prefill_share_of_bound": benchmark.prefill_bound_of(name),
        "decode_ms_per_token": found.decode and asdict(found.decode.pruned),
        "decode_time_ratio": found.decode and asdict(found.decode.ratio),
        "decode_bytes_ratio": benchmark.bytes_ratio_of(name),
        "decode_share_of_bound": benchmark.decode_bound_of(name),
        "peak_bytes_above_weights": found.peak_memory,
        "visual_kv_bytes": found.visual_kv,
        "planned_visual_kv_bytes": benchmark.planned_kv_of(name),
    }


def _context(benchmark: Benchmark, at: AtContext) -> dict[str, Any]:
    return {
        "context": at.context,
        "decode": {
            name: {
                "ms_per_token": asdict(decode.pruned),
                "time_ratio": asdict(decode.ratio),
                "bytes_ratio": benchmark.bytes_ratio_of(name, at.plan),
            }
            for name, decode in at.decode.items()
        },
    }
