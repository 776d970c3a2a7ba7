"""Time what `yopo bench` does not: calibration, `apply` and loading, against their lower bounds.

Calibration is compared with a plain forward of the same batch and with the usual way to get
attention weights (eager, ``output_attentions=True``, every layer's matrix kept), `apply` with
`cp -r` of the same files on the same disk and a sync, and loading a baked checkpoint with loading
the original. Everything runs offline, on random weights at the widths of a published model. Prints
markdown rows:

    python scripts/limits.py --layers 4 --threads 1
    python scripts/limits.py --parts apply load --layers 6 --folder /var/tmp
    python scripts/limits.py --parts calibration --visual-tokens 2880 --layers 2
    python scripts/limits.py --parts memory --layers 32 --dtype bfloat16
    python scripts/limits.py --parts fit --layers 1 --batch 8 --threads 2 --runs 1
    python scripts/limits.py --parts budget --model qwen2-vl-tiny

Ratios are medians over runs in one process. The two sides take turns, and so does which of them
goes first. File caches are left as the runs leave them: both sides read from memory what fits,
unless `--cold` empties the cache of the original before each.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging as transformers_logging

from yopo.bench.memory import peak_bytes
from yopo.bench.plans import (
    FITTED,
    PRESETS,
    made_up_statistics,
    preset_plan,
    with_prompt,
)
from yopo.bench.prompt import made_up_prompt
from yopo.bench.random_model import (
    SHAPES,
    WORKLOAD,
    fitted,
    grids_of,
    published_model,
    random_model,
)
from yopo.calibration.measure import identify
from yopo.calibration.observers import observing
from yopo.checkpoint.bake import bake
from yopo.data.prompts import Batch, batches, encode_for
from yopo.data.sources import open_pairs
from yopo.data.split import pick
from yopo.demo import demo_data
from yopo.fitting.layerwise import enter
from yopo.fitting.profile import profile
from yopo.fitting.refit import refit
from yopo.models.registry import family_of
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.session import CalibrationSession
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest
from yopo.plans.grid import Grid
from yopo.plans.storage import write_plan
from yopo.serving.loading import load
from yopo.support.durable import sync_tree

PARTS = ("calibration", "memory", "apply", "load", "fit", "budget")
ROOM = 300e6
"""Bytes allowed to `apply` on top of two of the largest tensors: Python, torch, buffers."""

APPLY = """
import sys
from yopo.pipeline.commands import apply
apply(sys.argv[1], output=sys.argv[2], model=sys.argv[3])
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(1024 * int(line.split()[1]))
"""
"""Prints its own peak, because ``ru_maxrss`` of a child starts at its parent's."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: What is compared with what.
        value, floor: The two sides, with units.
        ratio: The first over the second.
        target: The bound that the ratio should meet.
    """

    what: str
    value: str
    floor: str
    ratio: float
    target: str

    def __str__(self) -> str:
        cells = (self.what, self.value, self.floor, f"{self.ratio:.2f}", self.target)
        return f"| {' | '.join(cells)} |"


HEADER = "| what | measured | reference | ratio | target |\n|---|---:|---:|---:|---:|"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:4])
    parser.add_argument("--shape-of", choices=sorted(SHAPES), default="llava-1.5-7b")
    parser.add_argument("--model", default="llava-tiny", help="demo model of the part budget")
    parser.add_argument("--samples", type=int, default=256, help="pairs of the part budget")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the models")
    parser.add_argument("--visual-tokens", type=int, default=WORKLOAD.visual)
    parser.add_argument("--text-tokens", type=int, default=WORKLOAD.text)
    parser.add_argument("--batch", type=int, default=1, help="prompts per forward")
    parser.add_argument("--dtype", default="float32", help="dtype of weights and checkpoints")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="yopo-25", help="what to bake")
    parser.add_argument("--shard-size", default="2GB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="`apply` and `cp` read from the disk")
    parser.add_argument("--folder", type=Path, help="where temporary checkpoints are written")
    return parser.parse_args(words)


def take_turns(
    first: Callable[[], object],
    second: Callable[[], object],
    runs: int,
    *,
    before: Callable[[], None] = lambda: None,
) -> tuple[float, float, float]:
    """Return the median seconds of both, and the median of the pairs' ratios, first over second.

    The first pair is a warm-up and not counted; which of the two goes first alternates. ``before``
    is called before each, and not counted.
    """

    def seconds(call: Callable[[], object]) -> float:
        before()
        gc.collect()
        os.sync()  # neither side pays for writes that the other left pending
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    pairs = []
    for number in range(runs + 1):
        if number % 2:
            pairs.append((seconds(first), seconds(second)))
        else:
            other = seconds(second)
            pairs.append((seconds(first), other))
    counted = pairs[1:]
    ratio = median(one / other for one, other in counted)
    return median(one for one, _ in counted), median(other for _, other in counted), ratio


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run the decoder with another attention implementation inside the block."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(implementation)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


class Calibration:
    """A calibration pass over one batch, a plain forward, and a forward that returns attention."""

    def __init__(self, options: argparse.Namespace):
        shape = replace(SHAPES[options.shape_of], layers=options.layers)
        identity = replace(published_model(options.shape_of), shape=shape)
        plan = preset_plan("yopo-25", identity, WORKLOAD)
        plan = with_prompt(plan, visual=options.visual_tokens, text=options.text_tokens)
        plan = fitted(plan)
        self.shape = shape
        self.model = random_model(shape, dtype=getattr(torch, options.dtype))
        self.prompt = made_up_prompt(self.model, plan, options.batch)
        self.family = replace(family_of(self.model.config), grids_of=grids_of(plan))
        self.options = options

    @torch.no_grad()
    def forward(self, **more: object) -> object:
        """Run a forward without a cache."""
        return self.prompt.prefill(self.model, use_cache=False, **more)

    def calibrate(self) -> None:
        """Run one pass, including everything that is computed once."""
        with observing(self.model, self.shape, self.family) as observer:
            observer.begin(self.prompt.inputs["attention_mask"])
            self.forward()
            observer.finish()

    def show_attention(self) -> list[torch.Tensor]:
        """Get attention weights from transformers the only way it offers: keep them all."""
        with attention(self.model, "eager"):
            return self.forward(output_attentions=True).attentions

    def time_rows(self) -> Iterator[Row]:
        """Yield rows that compare time with both."""
        mine, plain, ratio = take_turns(self.calibrate, self.forward, self.options.runs)
        name = "calibration pass over plain forward, time"
        yield Row(name, seconds(mine), seconds(plain), ratio, "<= 1.25")
        eager, mine, ratio = take_turns(self.show_attention, self.calibrate, self.options.runs)
        name = "`output_attentions=True` over calibration pass, time"
        yield Row(name, seconds(eager), seconds(mine), ratio, ">= 3")

    def memory_rows(self) -> Iterator[Row]:
        """Yield rows that compare peak memory with both."""
        used, plain, shown = (
            peak_bytes(call, "cpu") for call in (self.calibrate, self.forward, self.show_attention)
        )
        name = "calibration pass over plain forward, peak memory"
        yield Row(name, size(used), size(plain), used / plain, "<= 1.10")
        layers = f"{self.shape.layers} layers"
        name = f"`output_attentions=True` over calibration pass, peak memory, {layers}"
        yield Row(name, size(shown), size(used), shown / used, ">= 5")


class Fit:
    """The cost of fitted weights (moments, solves) against a plain forward of the same prompts."""

    def __init__(self, options: argparse.Namespace):
        side = math.isqrt(options.visual_tokens)
        if side**2 != options.visual_tokens:
            raise SystemExit(
                f"--visual-tokens {options.visual_tokens}: a fit needs a square number, such as "
                f"{side**2}."
            )
        self.shape = replace(SHAPES[options.shape_of], layers=options.layers)
        identity = replace(published_model(options.shape_of), shape=self.shape)
        workload = replace(WORKLOAD, grids=(Grid(side, side),), text=options.text_tokens)
        self.plan = preset_plan(FITTED, identity, workload)
        self.model = random_model(self.shape, dtype=getattr(torch, options.dtype), side=side)
        inputs = made_up_prompt(self.model, self.plan, options.batch).inputs
        pixels = torch.randn(options.batch, 3, 8 * side, 8 * side, dtype=self.model.dtype)
        self.encoded = [Batch({**inputs, "pixel_values": pixels}, None, (None,) * options.batch)]
        self.options = options

    @torch.no_grad()
    def forward(self) -> object:
        """Run a forward of all prompts without a cache."""
        return self.model.base_model(**self.encoded[0].inputs, use_cache=False)

    def profile(self) -> object:
        """Run the dense walk that measures what an allocation needs to know."""
        return profile(self.model, enter(self.model, self.encoded), self.shape)

    def fit(self) -> object:
        """Fit one plan."""
        return refit(self.model, enter(self.model, self.encoded), [self.plan])

    def rows(self) -> Iterator[Row]:
        """Yield rows for the time and memory of both."""
        prompts = f"{self.options.batch} prompts, {self.shape.layers} layers"
        plain = peak_bytes(self.forward, "cpu")
        for name, call in (("profile", self.profile), (f"fit of {FITTED}", self.fit)):
            name = f"{name} over plain forward, {prompts}"
            mine, floor, ratio = take_turns(call, self.forward, self.options.runs)
            yield Row(f"{name}, time", seconds(mine), seconds(floor), ratio, "-")
            used = peak_bytes(call, "cpu")
            yield Row(f"{name}, peak memory", size(used), size(plain), used / plain, "-")


class Budget:
    """What `calibrate --budget` does after the statistics, in forwards of the pairs it fits on."""

    def __init__(self, options: argparse.Namespace):
        run = RunOptions(samples=options.samples)
        self.session = CalibrationSession(options.model, run, FitOptions())
        data = demo_data(options.model, "calibration")
        pairs = pick(open_pairs(data, samples=run.samples, seed=run.seed), self.session.split.fit)
        model, processor = self.session.model, self.session.processor
        self.encoded = [
            encode_for(model, processor, group) for group in batches(pairs, run.batch_size)
        ]

    @torch.no_grad()
    def forward(self) -> None:
        """Run a forward of the pairs without a cache."""
        for batch in self.encoded:
            self.session.model.base_model(**batch.inputs, use_cache=False)

    def make(self) -> None:
        """Profile, then allocate, fit and compare plans."""
        found = self.session.make(BudgetRequest(0.12, compensation="refit"))
        self.plans = len(found.candidates)

    def rows(self) -> Iterator[Row]:
        """Yield a row for matrix products and one for time."""
        products, times = [], []
        for call in (self.forward, self.make):
            started = time.perf_counter()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            products.append(counter.get_total_flops())
            times.append(time.perf_counter() - started)
        name = f"{self.plans} plans over one forward of {len(self.session.split.fit)} pairs"
        plain, mine = products
        ratio = mine / plain
        yield Row(f"{name}, FLOPs", f"{mine / 1e9:.1f} G", f"{plain / 1e9:.1f} G", ratio, "<= 20")
        plain, mine = times
        yield Row(f"{name}, time", seconds(mine), seconds(plain), mine / plain, "-")


class Checkpoints:
    """An original checkpoint of random weights, its plan, and what is made from them."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options = options
        self.original, self.baked = folder / "original", folder / "baked"
        self.copy, self.plan_file = folder / "copy", folder / "plan.yaml"
        shape = replace(SHAPES[options.shape_of], layers=options.layers)
        model = random_model(shape, dtype=getattr(torch, options.dtype))
        self.largest = max(weight.nbytes for weight in model.parameters())
        model.save_pretrained(self.original, max_shard_size=options.shard_size)
        statistics = made_up_statistics(identify(model, str(self.original)), WORKLOAD, seed=0)
        self.plan, _ = make_plan(statistics, PRESETS[options.preset])
        write_plan(self.plan, str(self.plan_file), force=False)

    def apply(self) -> None:
        """Bake the plan in this process, so that Python's startup time is not counted."""
        bake(self.plan, self.original, self.baked)

    def copy_files(self) -> None:
        """Copy the original with the system's `cp`, and wait for the disk, as `apply` does."""
        subprocess.run(["cp", "-r", self.original, self.copy], check=True)
        sync_tree(self.copy)

    def reset(self) -> None:
        """Remove both results and, with --cold, the original from the file cache."""
        for folder in (self.baked, self.copy):
            shutil.rmtree(folder, ignore_errors=True)
        for path in self.original.iterdir() if self.options.cold else ():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)  # pages that wait to be written would stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)

    def peak_of_apply(self) -> int:
        """Return the peak resident bytes of `yopo apply` in its own process."""
        shutil.rmtree(self.baked, ignore_errors=True)
        command = [sys.executable, "-c", APPLY, self.plan_file, self.baked, self.original]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def apply_rows(self) -> Iterator[Row]:
        """Yield rows that compare time with a copy, and memory with its bound."""
        mine, copied, ratio = take_turns(
            self.apply, self.copy_files, self.options.runs, before=self.reset
        )
        name = "`apply` over `cp -r` and a sync, time"
        yield Row(name, seconds(mine), seconds(copied), ratio, "<= 1.5")
        if Path("/proc/self/status").is_file():
            peak, bound = self.peak_of_apply(), 2 * self.largest + ROOM
            name = "`apply`, peak resident memory over two of the largest tensors + 300 MB"
            yield Row(name, size(peak), size(bound), peak / bound, "< 1")

    def load_rows(self) -> Iterator[Row]:
        """Yield rows that compare loading the baked checkpoint with loading the original."""
        if not self.baked.is_dir():
            self.apply()

        stock = AutoModelForImageTextToText.from_pretrained
        name = "`yopo.load` of the baked checkpoint over transformers' of the original"
        for what, finish in (("until it returns", bool), ("until all weights are read", read)):
            mine, theirs, ratio = take_turns(
                lambda finish=finish: finish(load(self.baked)),
                lambda finish=finish: finish(stock(self.original, dtype="auto")),
                self.options.runs,
            )
            yield Row(f"{name}, {what}", seconds(mine), seconds(theirs), ratio, "<= 1.2")


def read(model: PreTrainedModel) -> None:
    """Touch every page of the weights, which are a mapped file until then."""
    for weight in model.parameters():
        weight.detach().view(-1)[::1024].sum()


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Measure the requested parts."""
    if {"calibration", "memory"}.intersection(options.parts):
        calibration = Calibration(options)
        if "calibration" in options.parts:
            yield from calibration.time_rows()
        if "memory" in options.parts:
            yield from calibration.memory_rows()
        del calibration
    if "fit" in options.parts:
        yield from Fit(options).rows()
    if "budget" in options.parts:
        yield from Budget(options).rows()
    if {"apply", "load"}.intersection(options.parts):
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="yopo-limits-") as folder:
            files = Checkpoints(options, Path(folder))
            if "apply" in options.parts:
                yield from files.apply_rows()
            if "load" in options.parts:
                yield from files.load_rows()


def seconds(value: float) -> str:
    """Format seconds for people."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"


def size(value: float) -> str:
    """Format bytes for people."""
    return f"{value / 1e6:.0f} MB" if value >= 1e7 else f"{value / 1e3:.0f} kB"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, row by row as it is measured."""
    options = arguments(words)
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    prompt = f"{options.visual_tokens} visual + {options.text_tokens} text tokens"
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    print(
        f"{options.layers} layers of {options.shape_of}, {options.batch} x ({prompt}), "
        f"{options.dtype}, {threads}, medians of {options.runs} pairs\n\n{HEADER}",
        flush=True,
    )
    for row in rows(options):
        print(row, flush=True)


if __name__ == "__main__":
    main()
