"""Time reductions of visual tokens against the decoder prefill that they save.

LLaVA-1.5-7B's decoder with random weights and random image features. In every round the dense
prefill, one prefill behind each method and each method by itself (choosing tokens and mixing their
features) take turns. The tables show medians over the rounds: milliseconds of the method, what the
prefill saves with tokens that cost nothing to choose (the first ones), and the prefill with the
method in it over the dense one of the same round.

    python scripts/reduction_times.py --device cuda --dtype bfloat16
    python scripts/reduction_times.py --width 1024 --layers 2 --tokens 144 --rounds 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from yopo.bench.prompt import Prompt, made_up_prompt
from yopo.bench.random_model import grids_of, published_model, random_model
from yopo.evaluation.timing import now
from yopo.plans.flops import dense_prefill_flops, flops_of_reduction, prefill_flops
from yopo.plans.grid import Grid
from yopo.plans.layer_plan import ModelShape
from yopo.plans.schema import PruningPlan, Workload, full_plan
from yopo.reduction.method import Images, Method, Question, Selection
from yopo.reduction.registry import make_method
from yopo.runtime.install import pruned

METHODS = ("par", "divprune", "cdpruner", "scope", "prumerge", "folder", "random", "grid")
TEXT, BEFORE = 64, 5
SIDES = {576: (24, 24), 2880: (48, 60)}
"""Rows and columns of LLaVA-1.5's image, and of as many tokens as LLaVA-NeXT's five."""


@dataclass(frozen=True)
class First(Method):
    """The first tokens, which take no time to choose."""

    name: ClassVar[str] = "first"
    label: ClassVar[str] = "the first tokens"

    def select(self, images: Images) -> Selection:
        """The first ones."""
        count = self.count(images.sides)
        kept = torch.arange(count, device=images.features.device)
        return Selection(kept.expand(len(images.features), -1))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--layers", type=int, help="of the decoder; all of them if not given")
    parser.add_argument("--width", type=int, help="of the decoder, for a quick look on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=80.0, help="start no round after these")
    return parser.parse_args()


def shape_of(options: argparse.Namespace) -> ModelShape:
    """The decoder: LLaVA-1.5-7B's, or one of its proportions."""
    shape = published_model("llava-1.5-7b").shape
    if options.layers:
        shape = replace(shape, layers=options.layers)
    if options.width:
        heads = options.width // shape.head_dim
        ffn = shape.ffn * options.width // shape.hidden
        shape = replace(shape, hidden=options.width, heads=heads, kv_heads=heads, ffn=ffn)
    return shape


def plan_of(shape: ModelShape, tokens: int) -> PruningPlan:
    """The plan that prunes nothing, for one image."""
    rows, cols = SIDES.get(tokens) or (tokens, 1)
    identity = replace(published_model("llava-1.5-7b"), shape=shape)
    return full_plan(identity, Workload((Grid(rows, cols),), TEXT, BEFORE))


class Timing:
    """One model and one prompt.

    Args:
        model: Dense, in memory.
        plan: The plan that prunes nothing, for this prompt.
    """

    def __init__(self, model: PreTrainedModel, plan: PruningPlan):
        self.model, self.plan = model, plan
        self.prompt: Prompt = made_up_prompt(model, plan, 1)
        generator = torch.Generator().manual_seed(1)
        grid, width = plan.workload.grids[0], plan.model.shape.hidden
        words = plan.workload.text - plan.workload.text_before

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(model.device, model.dtype)

        ones = torch.ones(1, words, device=model.device)
        attention = draw(1, grid.tokens).float().softmax(dim=1)
        self.images = Images(
            draw(1, grid.tokens, width),
            (grid.rows, grid.cols),
            Question(draw(1, words, width), ones),
            attention,
            (0,),
        )

    def prefill(self, method: Method | None) -> float:
        """Milliseconds of a prefill, behind a method if there is one."""
        switch: AbstractContextManager[object] = nullcontext()
        if method is not None:
            plan = replace(self.plan, reduction=method)
            switch = pruned(self.model, plan, grids_of=grids_of(plan), check=False)
        with switch:
            return self._time(lambda: self.prompt.prefill(self.model))

    def alone(self, method: Method) -> float:
        """Milliseconds of choosing tokens and mixing their features."""

        def run() -> None:
            chosen, features = method.select(self.images), self.images.features
            if chosen.mixing is not None:
                (chosen.mixing @ features.float()).to(features)

        return self._time(run)

    def _time(self, call: Callable[[], object]) -> float:
        started = now(self.model.device)
        call()
        return now(self.model.device) - started


Times = dict[str, list[float]]


def measure(timing: Timing, methods: list[Method], options: argparse.Namespace) -> Times:
    """Milliseconds of everything, round by round; the first round warms up and does not count."""
    free = First(methods[0].keep)
    times: Times = {"dense": [], "free": []}
    started = time.monotonic()
    for number in range(options.rounds + 1):
        if number > 1 and time.monotonic() - started > options.seconds:
            break
        found = {"dense": timing.prefill(None), "free": timing.prefill(free)}
        for method in methods:
            found[method.name] = timing.alone(method)
            found[f"with {method.name}"] = timing.prefill(method)
        for name, value in found.items() if number else ():
            times.setdefault(name, []).append(value)
    return times


def show(timing: Timing, methods: list[Method], times: Times, where: str) -> None:
    """Print a table."""
    plan, dense = timing.plan, median(times["dense"])
    shape, workload = plan.model.shape, plan.workload
    keep = methods[0].count((workload.grids[0].rows, workload.grids[0].cols))
    saved = median(a - b for a, b in zip(times["dense"], times["free"], strict=True))
    print(
        f"\n{workload.visual} visual tokens of width {shape.hidden}, {keep} kept; {shape.layers} "
        f"layers, {where}, {len(times['dense'])} rounds. Dense prefill {dense:.1f} ms; without the "
        f"dropped tokens {median(times['free']):.1f} ms, {saved:.1f} ms less.\n"
    )
    print(
        "| method | own ms | of what it saves | prefill over dense | FLOPs over dense | its own |"
    )
    print("|---|" + "---:|" * 5)
    whole = dense_prefill_flops(shape, workload)
    free = prefill_flops(replace(plan, reduction=First(methods[0].keep)))
    for method in methods:
        own, cost = median(times[method.name]), flops_of_reduction(method, shape, workload)
        pairs = zip(times[f"with {method.name}"], times["dense"], strict=True)
        over = median(a / b for a, b in pairs)
        cells = [f"{own:.2f}", f"{100 * own / saved:.1f} %" if saved > 0 else "", f"{over:.2f}"]
        cells += [f"{(free + cost) / whole:.3f}", f"{cost / whole:.4f}"]
        print(f"| {method.name} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def main() -> None:
    """Time and print a table per number of tokens and share."""
    options = arguments()
    shape = shape_of(options)
    model = random_model(shape, dtype=getattr(torch, options.dtype), device=options.device)
    where = f"{options.device}, {options.dtype}"
    if options.device.startswith("cuda"):
        where = f"{torch.cuda.get_device_name(options.device)}, {options.dtype}"
    started = time.monotonic()
    for tokens in options.tokens:
        timing = Timing(model, plan_of(shape, tokens))
        for share in options.shares:
            methods = [make_method(name, share) for name in options.methods]
            options.seconds -= time.monotonic() - started
            started = time.monotonic()
            show(timing, methods, measure(timing, methods, options), where)


if __name__ == "__main__":
    main()
