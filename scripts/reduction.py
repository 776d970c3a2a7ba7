"""Measure reductions of visual tokens: alone, and in front of a plan that is calibrated behind it.

Prints markdown rows: whole answers, the worst kind's, and logit KL on held-out pairs, beside visual
FLOPs and KV bytes over the dense model's.

    python scripts/reduction.py alone --model llava-tiny
    python scripts/reduction.py ablation --model llava-tiny
    python scripts/reduction.py front --model llava-tiny --plan plan.yaml
    python scripts/reduction.py pure --model llava-tiny --budgets 0.05 0.12
    python scripts/reduction.py composed --model llava-tiny --method par --share 0.5

* ``alone``: every method at 50, 25 and 11 % of the tokens, every layer dense behind it.
* ``ablation``: what the steps of PAR are worth, and CDPruner's prompt.
* ``front``: reductions in front of a plan that stays as it was calibrated, on all tokens;
  neighborhoods become whole images, because a reduction leaves none.
* ``pure``: an allocated plan at each budget of visual FLOPs, no reduction.
* ``composed``: the same, calibrated on the tokens that a method leaves (``yopo calibrate
  --reduce``); the reduction's own FLOPs count.
* ``matched``: a pure plan with no more KV bytes than the best composition of a share, found among
  the results of ``composed`` in ``--results``; best is the least KL on the comparison pairs.
* ``tight``: the same composition and, without ``--share``, the pure plan, both within a small
  budget of KV bytes.

``scripts/reduction_study.py`` runs all of it and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from yopo.calibration.measure import identify, measure
from yopo.calibration.questions import questions_of
from yopo.evaluation.fidelity import compare, kinds_of_records, record_dense, worst_kind
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.opening import open_for
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.session import CalibrationSession
from yopo.planning.request import BudgetRequest
from yopo.plans.flops import dense_visual_kv_bytes, visual_budget, visual_kv_bytes
from yopo.plans.schema import PruningPlan, full_plan
from yopo.plans.storage import read_plan
from yopo.reduction.method import Method
from yopo.reduction.registry import make_method, method_class, parse_method
from yopo.runtime.install import pruned
from yopo.support.errors import YopoError

METHODS = ("par", "divprune", "cdpruner", "scope", "prumerge+", "folder", "random", "grid")
SHARES = (0.5, 0.25, 0.11)
BUDGETS = (0.05, 0.12)
TIGHT_KV = 0.03
"""A budget of KV bytes that asks for few bits of any plan, with fewer tokens or without."""

ABLATION: tuple[tuple[str, dict[str, bool]], ...] = (
    ("par", {}),
    ("par", {"prompt": False}),
    ("par", {"words": False}),
    ("par", {"graph": False}),
    ("par", {"router": False}),
    ("par", {"merge": False}),
    ("par", {"prompt": False, "merge": False}),
    ("cdpruner", {}),
    ("cdpruner", {"prompt": False}),
)


Case = tuple[str, float, dict[str, Any]]
"""A method, a share of the tokens, and parameters."""

EVERY: list[Case] = [(name, share, {}) for share in SHARES for name in METHODS]


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        part: A key of ``PARTS``.
        model: The model.
        seed: Draws the pairs to calibrate and to evaluate on, and random tokens.
        method: The reduction of ``composed``, perhaps with parameters: ``par,prompt=false``.
        share: The share of tokens of ``composed``, ``matched`` and ``tight``.
        budgets: Shares of the visual FLOPs, where there are plans.
    """

    part: str
    model: str
    seed: int
    method: str | None = None
    share: float | None = None
    budgets: tuple[float, ...] = BUDGETS

    @property
    def name(self) -> str:
        """The name of its file."""
        what = [self.part, self.model, f"seed{self.seed}", self.method]
        share = None if self.share is None else f"{self.share:g}"
        budgets = None if self.budgets == BUDGETS else "-".join(f"{b:g}" for b in self.budgets)
        return "_".join(each for each in (*what, share, budgets) if each)


class Measuring:
    """One job's model and pairs.

    Args:
        job: What to measure.
        options: Numbers of pairs, and where other jobs' results are.
    """

    def __init__(self, job: Job, options: argparse.Namespace):
        self.job, self.options = job, options
        self._held_out = self._run(options.pairs)
        self._handle = ModelHandle(job.model, None, self._held_out)

    def _run(self, samples: int) -> RunOptions:
        tokens = self.options.max_new_tokens
        return RunOptions(samples=samples, seed=self.job.seed, batch_size=32, max_new_tokens=tokens)

    @cached_property
    def _records(self) -> list:
        handle = self._handle
        pairs = open_for(handle, self._held_out, handle.name, "heldout")
        tokens = self._held_out.max_new_tokens
        return record_dense(
            handle.model, handle.processor, pairs, batch_size=32, max_new_tokens=tokens
        )

    def whole(self) -> PruningPlan:
        """The plan that prunes nothing, its costs those of a typical held-out prompt."""
        handle = self._handle
        pairs = [pair for record in self._records for pair in record.batch.pairs]
        found = measure(handle.model, handle.processor, pairs[:32], name=handle.name)
        return full_plan(identify(handle.model, handle.name), found.workload)

    def front(self) -> PruningPlan:
        """The plan of a file, without neighborhoods."""
        plan = read_plan(self.options.plan)
        return plan.with_layers([replace(layer, radius=None) for layer in plan.layers])

    def session(self, method: Method | None) -> CalibrationSession:
        """A calibration on the tokens that a method leaves."""
        samples = self.options.samples
        fit = FitOptions(measure_pairs=samples, fit_pairs=samples, reduction=method)
        return CalibrationSession(self.job.model, self._run(samples), fit)

    def row(self, plan: PruningPlan, **more: Any) -> dict[str, Any]:
        """What a plan costs and keeps of the dense model's answers to held-out pairs."""
        kinds = kinds_of_records(self._records)
        with pruned(self._handle.model, plan, check=False):
            found = compare(self._handle.model, self._records)
        by_kind = found.split(kinds)
        worst = worst_kind(by_kind)
        dense_kv = dense_visual_kv_bytes(plan.model.shape, plan.workload)
        return {
            **asdict(self.job),
            "reduction": None if plan.reduction is None else named(plan.reduction),
            "tokens": plan.seen.visual,
            "of": plan.workload.visual,
            "flops": visual_budget(plan),
            "kv": visual_kv_bytes(plan) / dense_kv,
            "pairs": len(kinds),
            "whole": found.whole_answers / len(kinds),
            "worst": by_kind[worst].whole_answers / len(by_kind[worst].by_pair),
            "worst_kind": worst,
            "kl": found.kl,
            **more,
        }

    def missing(self, error: YopoError, **more: Any) -> dict[str, Any]:
        """A row for what cannot be done, with the reason."""
        return {**asdict(self.job), "missing": error.message, **more}

    def method(self, name: str, share: float, **parameters: Any) -> Method:
        """A method with this job's seed, if it takes one."""
        seed = {"seed": self.job.seed} if name == "random" else {}
        return self._calibrated(make_method(name, share, **seed, **parameters))

    def _calibrated(self, method: Method) -> Method:
        return method.calibrated(self._questions) if method.needs_questions else method

    @cached_property
    def _questions(self) -> list[set[int]]:
        handle, run = self._handle, self._run(self.options.samples)
        pairs = open_for(handle, run, handle.name, "calibration")
        return questions_of(handle.model, handle.processor, pairs, batch_size=32)

    def described(self, text: str, share: float) -> Method:
        """The method of a job, from its name and perhaps parameters."""
        name, *parameters = text.split(",")
        if not parameters:
            return self.method(name, share)
        return self._calibrated(parse_method(",".join([f"{name}:{share}", *parameters])))


def alone(measuring: Measuring) -> Iterator[dict[str, Any]]:
    """Every method at every share, after none at all."""
    yield from _before(measuring, measuring.whole(), EVERY)


def ablation(measuring: Measuring) -> Iterator[dict[str, Any]]:
    """PAR without each of its steps."""
    cases = [(name, share, parameters) for share in SHARES for name, parameters in ABLATION]
    yield from _before(measuring, measuring.whole(), cases)


def front(measuring: Measuring) -> Iterator[dict[str, Any]]:
    """Every method in front of a finished plan."""
    yield from _before(measuring, measuring.front(), EVERY)


def _before(
    measuring: Measuring, plan: PruningPlan, cases: Sequence[Case]
) -> Iterator[dict[str, Any]]:
    yield measuring.row(plan)
    for name, share, parameters in cases:
        method = measuring.method(name, share, **parameters)
        more = {"method": name, "share": share, "parameters": parameters}
        try:
            yield measuring.row(replace(plan, reduction=method), **more)
        except YopoError as error:
            yield measuring.missing(error, **more)


def pure(measuring: Measuring) -> Iterator[dict[str, Any]]:
    """Plans on all tokens."""
    yield from _planned(measuring, None, [(each, None) for each in measuring.job.budgets])


def composed(measuring: Measuring) -> Iterator[dict[str, Any]]:
    """Plans on the tokens that a method leaves."""
    job = measuring.job
    assert job.method is not None and job.share is not None, "checked with the arguments"
    method = measuring.described(job.method, job.share)
    yield from _planned(measuring, method, [(each, None) for each in job.budgets])


def matched(measuring: Measuring) -> Iterator[dict[str, Any]]:
    """Pure plans with the FLOPs and the KV bytes of the best composition of a share."""
    job = measuring.job
    best = {each: best_composition(job, each, measuring.options.results) for each in job.budgets}
    wanted = [(each, row["kv"], row["method"]) for each, row in best.items() if row is not None]
    yield from _planned(measuring, None, wanted)


def tight(measuring: Measuring) -> Iterator[dict[str, Any]]:
    """The best composition of a share, or the pure plan, within few KV bytes."""
    job = measuring.job
    if job.share is None:
        yield from _planned(measuring, None, [(each, TIGHT_KV) for each in job.budgets])
        return
    for budget in job.budgets:
        row = best_composition(job, budget, measuring.options.results)
        if row is not None:
            method = measuring.described(row["method"], job.share)
            yield from _planned(measuring, method, [(budget, TIGHT_KV, row["method"])])


def best_composition(job: Job, budget: float, results: Path) -> dict[str, Any] | None:
    """The composition of a job's model, seed and share that calibration found to be the best."""
    rows = [
        row
        for row in read_rows(results)
        if row["part"] == "composed"
        and (row["model"], row["seed"], row["share"]) == (job.model, job.seed, job.share)
        and row.get("budget") == budget
        and "missing" not in row
        and row["method"] != "random"
    ]
    return min(rows, key=lambda row: row["judged"], default=None)


def _planned(
    measuring: Measuring, method: Method | None, wanted: Sequence[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """A plan for each wanted (budget, KV budget, perhaps the method of the best composition)."""
    if not wanted:
        return
    session = measuring.session(method)
    for budget, kv_budget, *best in wanted:
        started = time.monotonic()
        more: dict[str, Any] = {"budget": budget, "kv_budget": kv_budget}
        more |= {"best": best[0]} if best else {}
        try:
            request = BudgetRequest(budget, kv_budget=kv_budget, compensation="refit")
            made = session.make(request)
            judged = made.candidates[0].kl
            more |= {"judged": judged, "seconds": round(time.monotonic() - started, 1)}
            yield measuring.row(made.plan, **more)
        except YopoError as error:
            yield measuring.missing(error, **more)


PARTS: dict[str, Callable[[Measuring], Iterator[dict[str, Any]]]] = {
    "alone": alone,
    "ablation": ablation,
    "front": front,
    "pure": pure,
    "composed": composed,
    "matched": matched,
    "tight": tight,
}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of all results in a folder, in order of their files' names."""
    return [
        row
        for path in sorted(folder.glob("*.json"))
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]


def named(method: Method) -> str:
    """A method and the parameters that differ from its defaults."""
    usual = method_class(method.name)(method.keep).to_dict()
    changed = [
        f"{key} {value}"
        for key, value in method.to_dict().items()
        if usual.get(key) != value and key not in ("seed", "common")
    ]
    return ", ".join([f"{method.name} {100 * method.keep:g} %", *changed])


def cells(row: dict[str, Any]) -> list[str]:
    """The numbers of a row of a table."""
    return [
        f"{row['tokens']} of {row['of']}",
        f"{100 * row['flops']:.1f} %",
        f"{100 * row['kv']:.1f} %",
        f"{100 * row['whole']:.1f} %",
        f"{100 * row['worst']:.1f} %",
        f"{row['kl']:.4f}",
    ]


def label(row: dict[str, Any]) -> str:
    """The name of a row of a table."""
    name = row.get("reduction") or "all tokens"
    if row.get("budget") is not None:
        name += f", plan at {100 * row['budget']:g} %"
    if row.get("kv_budget") is not None:
        name += f", KV budget {100 * row['kv_budget']:.3g} %"
    return name


def run(job: Job, options: argparse.Namespace, *, show: bool = True) -> None:
    """Measure a job; print its rows, and write them once all are there."""
    started, rows = time.monotonic(), []
    torch.set_num_threads(1)
    if show:
        print(f"| {job.model}, seed {job.seed} | tokens | FLOPs | KV | whole | worst | KL |")
        print("|---|" + "---:|" * 6)
    for row in PARTS[job.part](Measuring(job, options)):
        rows.append(row)
        if show and "missing" in row:
            print(f"| {row.get('method') or 'plan'}: {row['missing']} |", flush=True)
        elif show:
            print(f"| {' | '.join([label(row), *cells(row)])} |", flush=True)
    if options.output is not None:
        seconds = round(time.monotonic() - started, 1)
        found = {"job": asdict(job), "seconds": seconds, "rows": rows}
        aside = options.output.with_suffix(".part")
        aside.write_text(json.dumps(found, indent=1), encoding="utf-8")
        aside.replace(options.output)


def add_numbers(parser: argparse.ArgumentParser) -> None:
    """Options of a single job that the whole study takes, too."""
    parser.add_argument("--samples", type=int, default=96, help="calibration pairs")
    parser.add_argument("--pairs", type=int, default=128, help="held-out pairs")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")


def main() -> None:
    """Run one job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default="llava-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", help="of composed")
    parser.add_argument("--share", type=float, help="of composed, matched and tight")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--plan", help="of front")
    parser.add_argument("--results", type=Path, default=Path("reduction-results"))
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    add_numbers(parser)
    options = parser.parse_args()
    needed = {"composed": ("method", "share"), "matched": ("share",), "front": ("plan",)}
    for name in needed.get(options.part, ()):
        if getattr(options, name) is None:
            parser.error(f"{options.part} needs --{name}")
    budgets = tuple(options.budgets)
    run(
        Job(options.part, options.model, options.seed, options.method, options.share, budgets),
        options,
    )


if __name__ == "__main__":
    main()
