"""Where the time of a prefill on a GPU goes: with and without CUDA graphs, pruned and dense.

A LLaVA of a published shape with random weights prefills the same prompts in four ways: stock
transformers; the dense model in the runtime of pruned ones, replayed; the pruned model without
graphs; and replayed. Each row is one way to run one prompt: medians of the time until everything is
done, of the time after which the call returned (the host's share), the kernels' own time, and how
often the driver was called to start something or to wait. Without a GPU nothing is replayed, and
only the first two columns are there.

    python scripts/prefill_graphs.py --prompts 1x576 1x2880 8x576
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from yopo.bench.dense import dense
from yopo.bench.plans import preset_plan, sampled_layers, with_layers, with_prompt
from yopo.bench.prompt import made_up_prompt
from yopo.bench.random_model import WORKLOAD, fitted, grids_of, published_model, random_model
from yopo.bench.subject import Bench
from yopo.runtime.install import pruned

STARTS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
"""Calls that start a kernel; a whole graph is started by one of ``cudaGraphLaunch``."""

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
UNTIMED = 3


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape-of", default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--presets", nargs="+", default=["yopo-25", "yopo-12"])
    parser.add_argument("--prompts", nargs="+", default=["1x576", "1x2880", "8x576"])
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    options = parse(arguments)
    published, model = published_model(options.shape_of), None
    print("| prompt | way | ms | host ms | kernels ms | kernels started | graphs | waits |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for prompt in options.prompts:
        batch, visual = map(int, prompt.split("x"))
        for number, preset in enumerate(options.presets):
            plan = preset_plan(preset, published, WORKLOAD)
            plan = with_prompt(plan, visual=visual, text=options.text)
            used = sampled_layers(plan, options.layers or len(plan.layers))
            plan = fitted(with_layers(plan, used))
            if model is None:
                dtype = getattr(torch, options.dtype)
                model = random_model(plan.model.shape, dtype=dtype, device=options.device)
            inputs = made_up_prompt(model, plan, batch)
            subject = Bench(model, plan, inputs, grids_of(plan))
            for name, way in ways(subject, preset, with_dense=number == 0):
                with way:
                    cells = measured(subject, options.runs, options.device)
                print(f"| {prompt} + {options.text} | {name} | {' | '.join(cells)} |", flush=True)


def ways(
    subject: Bench, preset: str, *, with_dense: bool
) -> Iterator[tuple[str, AbstractContextManager[object]]]:
    """Names, and the contexts in which the model runs so."""
    model, plan, where = subject.model, subject.plan, subject.grids_of
    if with_dense:
        yield "stock", nullcontext()
        yield "dense, replayed", dense(model, plan)
    for name, has_graphs in ((f"{preset}, no graphs", False), (f"{preset}, replayed", True)):
        yield name, pruned(model, plan, grids_of=where, check=False, cuda_graphs=has_graphs)


def measured(subject: Bench, runs: int, device: str) -> list[str]:
    """The cells of one row."""
    is_cuda = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if is_cuda else lambda: None
    for _ in range(UNTIMED):
        subject.prefill()
    whole, host = [], []
    for _ in range(runs):
        wait()
        started = time.perf_counter()
        kept = subject.prefill()
        host.append(time.perf_counter() - started)
        wait()
        whole.append(time.perf_counter() - started)
        del kept
    cells = [f"{1e3 * median(times):.1f}" for times in (whole, host)]
    if not is_cuda:
        return [*cells, "", "", "", ""]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        subject.prefill()
        wait()
    kernels, counts = 0.0, dict.fromkeys(("starts", "graphs", "waits"), 0)
    for each in profiler.events():
        if each.device_type == torch.autograd.DeviceType.CUDA:
            kernels += each.time_range.elapsed_us() / 1e3
        counts["starts"] += each.name in STARTS
        counts["graphs"] += each.name == "cudaGraphLaunch"
        counts["waits"] += each.name in WAITS
    return [*cells, f"{kernels:.1f}", *map(str, counts.values())]


if __name__ == "__main__":
    main()
