"""Measure reductions of visual tokens against the dense model: alone, or in front of a plan.

Prints a markdown table per share of tokens: whole answers, the worst kind's, and logit KL on
held-out pairs, beside visual FLOPs and KV bytes over the dense model's.

    python scripts/reduction.py --model llava-tiny
    python scripts/reduction.py --model llava-tiny --ablation
    python scripts/reduction.py --model llava-tiny --plan plan.yaml

With ``--plan`` the plan stays as it was calibrated, on all tokens; neighborhoods become whole
images, because a reduction leaves none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from yopo.calibration.measure import identify
from yopo.evaluation.fidelity import compare, kinds_of_records, record_dense, worst_kind
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.opening import open_for
from yopo.pipeline.options import RunOptions
from yopo.plans.flops import dense_visual_kv_bytes, visual_budget, visual_kv_bytes
from yopo.plans.grid import Grid
from yopo.plans.schema import PruningPlan, Workload, full_plan
from yopo.plans.storage import read_plan
from yopo.reduction.method import Method
from yopo.reduction.registry import make_method, method_class
from yopo.runtime.install import pruned

METHODS = ("par", "divprune", "cdpruner", "folder", "random", "grid")
SHARES = (0.5, 0.25, 0.11)
ABLATION = (
    ("par", {}),
    ("par", {"prompt": False}),
    ("par", {"graph": False}),
    ("par", {"router": False}),
    ("par", {"merge": False}),
    ("par", {"prompt": False, "merge": False}),
    ("cdpruner", {}),
    ("cdpruner", {"prompt": False}),
)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llava-tiny")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=8, help="of the image that costs are for")
    parser.add_argument("--plan", help="a plan to put the reductions in front of")
    parser.add_argument("--ablation", action="store_true", help="what steps of PAR are worth")
    arguments = parser.parse_args()
    options = RunOptions(samples=arguments.pairs, seed=arguments.seed)
    handle = ModelHandle(arguments.model, None, options)
    pairs = open_for(handle, options, handle.name, "heldout")
    records = record_dense(handle.model, handle.processor, pairs, batch_size=8, max_new_tokens=32)
    kinds = kinds_of_records(records)
    plan = base(arguments.plan, handle, arguments.side)
    print(f"| {arguments.model}, {len(kinds)} pairs | tokens | FLOPs | KV | whole | worst | KL |")
    print("|---|" + "---:|" * 6)
    for method in tried(ablation=arguments.ablation):
        made = replace(plan, reduction=method)
        with pruned(handle.model, made):
            found = compare(handle.model, records)
        by_kind = found.split(kinds)
        worst = by_kind[worst_kind(by_kind)]
        shape, workload = made.model.shape, made.workload
        kv = visual_kv_bytes(made) / dense_visual_kv_bytes(shape, workload)
        cells = (
            named(method),
            f"{made.seen.visual} of {workload.visual}",
            f"{100 * visual_budget(made):.1f} %",
            f"{100 * kv:.1f} %",
            f"{100 * found.whole_answers / len(kinds):.1f} %",
            f"{100 * worst.whole_answers / len(worst.by_pair):.1f} %",
            f"{found.kl:.4f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def base(path: str | None, handle: ModelHandle, side: int) -> PruningPlan:
    """The plan behind the reductions: a file's, or one that prunes nothing."""
    if path is not None:
        plan = read_plan(path)
        return plan.with_layers([replace(layer, radius=None) for layer in plan.layers])
    workload = Workload((Grid(side, side),), 20, 4)
    return full_plan(identify(handle.model, handle.name), workload)


def tried(*, ablation: bool) -> Iterator[Method | None]:
    """Every method at every share, after none at all."""
    yield None
    cases = ABLATION if ablation else tuple((name, {}) for name in METHODS)
    for share in SHARES:
        for name, parameters in cases:
            yield make_method(name, share, **parameters)


def named(method: Method | None) -> str:
    """A method and the parameters that differ from its defaults."""
    if method is None:
        return "all tokens"
    usual = method_class(method.name)(method.keep).to_dict()
    changed = [f"{key} {value}" for key, value in method.to_dict().items() if usual[key] != value]
    return ", ".join([f"{method.name} {100 * method.keep:g} %", *changed])


if __name__ == "__main__":
    main()
