"""Time passes whose forwards pass the layers in turns over the plain loops, on a resident model.

Alternating runs of the statistics, of recording the dense model's answers and of comparing a plan
with it; prints each one's median time over that of the plain loop, by the clock and by the CPU time
of the process, and checks that the results are the same bit for bit.

    python scripts/turns.py --model llava-tiny --pairs 32 --batch-size 4 --rounds 5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from yopo.calibration.measure import measure
from yopo.calibration.statistics import Statistics
from yopo.data.pairs import Pair
from yopo.data.prompts import Batch
from yopo.evaluation.fidelity import Recorded, compare, record_dense
from yopo.models.window import window_of
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.opening import open_for
from yopo.pipeline.options import RunOptions
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest
from yopo.runtime.install import pruned

MEMORY = 1 << 40
"""Bytes of a window that holds all batches."""


def main() -> None:
    """Print a line per pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llava-tiny")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    options = RunOptions(samples=arguments.pairs)
    handle = ModelHandle(arguments.model, None, options)
    pairs = list(open_for(handle, options, handle.name, "heldout"))
    print("| pass | plain (s) | in turns (s) | ratio | of CPU time |\n|---|---:|---:|---:|---:|")
    for name, call in passes(handle, pairs, arguments.batch_size, arguments.max_new_tokens).items():
        (plain, own), (turns, other) = times(call, arguments.rounds)
        cells = f"{plain:.2f} | {turns:.2f} | {turns / plain:.2f} | {other / own:.2f}"
        print(f"| {name} | {cells} |", flush=True)


def passes(
    handle: ModelHandle, pairs: Sequence[Pair], batch_size: int, max_new_tokens: int
) -> dict[str, Callable[[], Any]]:
    """The passes that go in turns, by name."""
    model, processor = handle.model, handle.processor

    def statistics() -> Any:
        return measure(model, processor, pairs, name=handle.name, batch_size=batch_size)

    def answers() -> Any:
        return record_dense(
            model, processor, pairs, batch_size=batch_size, max_new_tokens=max_new_tokens
        )

    plan, _ = make_plan(statistics(), BudgetRequest(0.2, template="reader-heads"))
    records = answers()

    def comparison() -> Any:
        with pruned(model, plan, check=False):
            return compare(model, records)

    return {"statistics": statistics, "dense answers": answers, "comparison": comparison}


def times(call: Callable[[], Any], rounds: int) -> list[tuple[float, float]]:
    """Median (seconds, CPU seconds) of plain calls and of calls in turns, whose results agree."""
    spent: tuple[list[tuple[float, float]], ...] = ([], [])
    found: list[Any] = [None, None]
    for _ in range(rounds):
        for number, switch in enumerate((nullcontext, lambda: window_of(MEMORY))):
            with switch():
                start = time.perf_counter(), time.process_time()
                found[number] = call()
                now = time.perf_counter(), time.process_time()
            spent[number].append((now[0] - start[0], now[1] - start[1]))
    assert is_same(*found), "in turns, the results differ"
    return [(median(each[0] for each in some), median(each[1] for each in some)) for some in spent]


def is_same(one: Any, other: Any) -> bool:
    """Whether results are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return all(is_same(*each) for each in zip(one, other, strict=True))
    if isinstance(one, Statistics | Recorded | Batch):
        return all(is_same(value, vars(other)[name]) for name, value in vars(one).items())
    if isinstance(one, dict):
        return all(is_same(value, other[name]) for name, value in one.items())
    return bool(one == other)


if __name__ == "__main__":
    main()
