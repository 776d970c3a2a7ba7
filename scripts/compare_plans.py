"""What a visual budget keeps: the measured planner, the paper's shape, and random choices.

Prints one markdown table, the README's, for the demo model:

    python scripts/compare_plans.py --heldout 1024

Every plan is calibrated on the calibration split and evaluated on held-out pairs. *Random* replaces
head activity and neuron importance by random scores under the very same shape; its accuracy is the
mean over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import mean

from yopo.calibration.prompts import load_processor
from yopo.calibration.run import measure
from yopo.calibration.sources import open_pairs
from yopo.calibration.statistics import Statistics
from yopo.demo import demo_data
from yopo.evaluation.evaluate import Evaluation, evaluate
from yopo.evaluation.fidelity import compare, record_dense
from yopo.families.registry import resolve
from yopo.flops import dense_visual_kv_bytes, visual_kv_bytes
from yopo.plan import Plan
from yopo.plan_tensors import PlanTensors
from yopo.planning.planner import make_plan
from yopo.planning.shapes import random_rho
from yopo.planning.wishes import Wishes
from yopo.runtime.install import pruned
from yopo.serving import load_dense

SEEDS = (0, 1, 2)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llava-tiny")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.12, 0.25, 0.5])
    parser.add_argument("--calibration", type=int, default=256, help="pairs to calibrate on")
    parser.add_argument("--heldout", type=int, default=1024, help="pairs to evaluate on")
    parser.add_argument("--search", type=int, default=0, help="also search with so many runs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    return parser.parse_args()


class Comparison:
    """One model, calibrated once, and its dense answers on held-out pairs."""

    def __init__(self, options: argparse.Namespace):
        source = resolve(options.model)
        self.options = options
        self.processor, self.model = load_processor(source.location), load_dense(source)
        pairs = open_pairs(
            demo_data(source.name, "calibration"), samples=options.calibration, seed=0
        )
        self.statistics = measure(
            self.model, self.processor, pairs, name=source.name, batch_size=options.batch_size
        )
        self.judged = self._record(list(pairs)[:64])
        heldout = open_pairs(demo_data(source.name, "heldout"), samples=options.heldout, seed=1)
        self.records = self._record(heldout)

    def _record(self, pairs):
        size, longest = self.options.batch_size, self.options.max_new_tokens
        return record_dense(
            self.model, self.processor, pairs, batch_size=size, max_new_tokens=longest
        )

    def judge(self, plan: Plan, tensors: PlanTensors) -> float:
        """Logit KL on calibration pairs."""
        with pruned(self.model, plan, tensors, check=False):
            return compare(self.model, self.judged).kl

    def evaluate(self, plan: Plan, tensors: PlanTensors, *, timed: bool = True) -> Evaluation:
        """Evaluate on the held-out pairs."""
        return evaluate(
            self.model,
            self.processor,
            plan,
            tensors,
            [],
            records=self.records,
            batch_size=self.options.batch_size,
            max_new_tokens=self.options.max_new_tokens,
            timing_runs=15 if timed else 0,
        )

    def rows(self) -> Iterator[list[str]]:
        """Yield the table's rows."""
        searches = [None] + ([self.options.search] if self.options.search else [])
        for budget in self.options.budgets:
            for search in searches:
                wishes = Wishes(budget=budget, search=search)
                plan, tensors, _ = make_plan(self.statistics, wishes, self.judge)
                flag = " --search" if search else ""
                name = f"`--budget {budget:g}{flag}` ({plan.provenance['shape']})"
                yield self.row(name, [self.evaluate(plan, tensors)])
        for wishes, name in self.paper_shapes():
            for statistics, kind in ((self.statistics, "scores"), (None, "random")):
                found = self.evaluate_shape(wishes, statistics)
                yield self.row(f"{name}, {kind}", found)

    def paper_shapes(self) -> Iterator[tuple[Wishes, str]]:
        """The presets, and the paper's shape at the largest budget."""
        yield Wishes(preset="yopo-12"), "`--preset yopo-12`"
        yield Wishes(preset="yopo-25"), "`--preset yopo-25`"
        largest = max(self.options.budgets)
        yield Wishes(budget=largest, shape="paper"), f"paper's shape at {largest:g}"

    def evaluate_shape(self, wishes: Wishes, statistics: Statistics | None) -> list[Evaluation]:
        """Evaluate a shape by its scores, or (None) by random ones, once per seed."""
        if statistics is not None:
            plan, tensors, _ = make_plan(statistics, wishes)
            return [self.evaluate(plan, tensors)]
        found = []
        for seed in SEEDS:
            plan, tensors, _ = make_plan(random_rho(self.statistics, seed), wishes)
            found.append(self.evaluate(plan, tensors, timed=False))
        return found

    def row(self, name: str, found: list[Evaluation]) -> list[str]:
        """Format one plan's evaluations (several: their mean)."""
        first = found[0]
        shape, workload = first.plan.model.shape, first.plan.workload
        dense = mean(each.accuracy.dense / each.accuracy.total for each in found)
        kept = mean(each.accuracy.pruned / each.accuracy.total for each in found)
        bytes_left = visual_kv_bytes(first.plan) / dense_visual_kv_bytes(shape, workload)
        return [
            name,
            f"{first.plan.budget.reached:.1%}",
            f"{kept:.1%}",
            f"{kept / dense:.1%}",
            f"{mean(each.fidelity.agreement for each in found):.1%}",
            f"{mean(each.fidelity.kl for each in found):.3f}",
            f"{first.prefill.ratio:.2f}" if first.prefill else "",
            f"{bytes_left:.0%}",
        ]


HEADER = (
    "plan",
    "visual FLOPs",
    "accuracy",
    "of dense",
    "top-1 agreement",
    "logit KL",
    "prefill time ratio",
    "visual KV",
)


def main() -> None:
    """Print the table."""
    options = arguments()
    comparison = Comparison(options)
    print(f"| {' | '.join(HEADER)} |")
    print("|---|" + "---:|" * (len(HEADER) - 1))
    for row in comparison.rows():
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
