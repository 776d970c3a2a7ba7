"""Time a whole calibration at the widths of a published model, on random weights, part by part.

The weights say nothing about plans, but time and memory do not depend on their values. Pairs are
those of `llava-tiny`, its pictures enlarged to the published number of visual tokens; the random
model never ends an answer, so every dense answer has all of its tokens.

    python scripts/whole_calibration.py --device cuda --dtype bfloat16
    python scripts/whole_calibration.py --layers 1 --side 4 --samples 32     # a small one, anywhere
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from large_checkpoint import fit_to_prompts
from transformers import PreTrainedModel, ProcessorMixin

from yopo.bench.random_model import SHAPES, random_model
from yopo.demo import demo_data
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.session import CalibrationSession
from yopo.planning.request import BudgetRequest
from yopo.plans.schema import ModelShape

DEMO = "llava-tiny"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape-of", choices=sorted(SHAPES), default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="decoder layers  [default: all]")
    parser.add_argument("--side", type=int, default=24, help="visual tokens per row and column")
    parser.add_argument("--samples", type=int, default=64, help="calibration pairs")
    parser.add_argument("--budget", type=float, default=0.12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args(words)


def model_and_processor(options: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model of the published widths that takes the demo model's prompts."""
    shape = SHAPES[options.shape_of]
    shape = replace(shape, layers=options.layers or shape.layers)
    return random_parts(shape, options.side, options.dtype, options.device)


def random_parts(
    shape: ModelShape, side: int, dtype: str, device: str = "cpu"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model of a shape, and a processor that makes ``side`` x ``side`` visual tokens."""
    demo = ModelHandle(DEMO, None, RunOptions())
    model = random_model(shape, dtype=getattr(torch, dtype), device=device, side=side)
    fit_to_prompts(model, demo.processor, side)
    return model, demo.processor


def timed(what: str, call: Callable[[], object], device: str) -> object:
    """Run one part and print its row: seconds, and peak device memory where that is counted."""
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    found = call()
    if on_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if on_cuda else "-"
    print(f"| {what} | {took:.1f} s | {peak} |", flush=True)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, row by row as it is measured."""
    options = arguments(words)
    model, processor = model_and_processor(options)
    run = RunOptions(
        data=demo_data(DEMO, "calibration"),
        samples=options.samples,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    layers = len(model.get_decoder().layers)
    print(f"| {layers} layers of {options.shape_of}, {options.dtype} | time | peak memory |")
    print("|---|---:|---:|", flush=True)

    def start() -> CalibrationSession:
        return CalibrationSession(model, run, FitOptions(), processor=processor)

    session = timed(f"statistics of {options.samples} pairs", start, options.device)
    assert isinstance(session, CalibrationSession)
    compared, fitted = len(session.split.comparison), len(session.split.fit)
    words_of = f"dense answers to {compared} pairs, {options.max_new_tokens} tokens each"
    timed(words_of, lambda: session.comparison, options.device)
    timed(f"profile on {fitted} pairs", lambda: session.fitter.profile, options.device)
    request = BudgetRequest(options.budget, compensation="refit")
    found = timed("plans: fitted and compared", lambda: session.make(request), options.device)
    print(f"{len(found.candidates)} plans")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
