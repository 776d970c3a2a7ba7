"""Run the whole study of reductions on all cores, and print its tables.

    python scripts/reduction_study.py run reduction-results --workers 15 --deadline 400
    python scripts/reduction_study.py collect reduction-results

Every job (`scripts/reduction.py`) is a process with one thread that writes one JSON file when it is
done. Files that are there are not made again, so a run that was cut short goes on when it is
repeated. Jobs start in order of importance. With a deadline none starts that is not expected to
end, after the times that jobs took so far; what still runs then is stopped. A job that fails leaves
its messages in a `.log` file and costs only its own rows.

Tables show the mean over seeds, and least .. most where there are several.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import reduction as single
from reduction import Job

from yopo.models.registry import family_of
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.options import RunOptions
from yopo.reduction.registry import method_class

MODELS = ("llava-tiny", "qwen2-vl-tiny", "internvl-tiny")
SEEDS = (0, 1, 2)
COMPOSED = ("par", "par,prompt=false", *single.METHODS[1:])
"""Methods whose compositions are measured at a half of the tokens."""

MAIN = ("par", "par,prompt=false", "divprune", "folder", "random")
"""Methods whose compositions are measured at a quarter of the tokens as well."""

OTHER_BUDGETS = (0.11, 0.25, 0.5)
"""Pure plans at the FLOPs of the methods alone."""

SECONDS = {
    "alone": 30,
    "ablation": 35,
    "pure": 35,
    "composed": 35,
    "matched": 55,
    "tight": 55,
}
"""What a job takes on one core, before any has ended."""

SLACK = 1.15
"""Over the expected time of a job."""

Row = dict[str, Any]


def jobs(models: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All jobs, the most important first; those that need others' results after these."""
    each = [(model, seed) for seed in seeds for model in models]
    found = [Job(part, *one) for part in ("alone", "pure") for one in each]
    for method in COMPOSED:
        found += [Job("composed", *one, method, 0.5) for one in each if runs_on(method, one[0])]
    found += [Job("ablation", *one) for one in each]
    found += [Job("matched", *one, share=0.5) for one in each]
    for method in MAIN:
        found += [Job("composed", *one, method, 0.25) for one in each]
    found += [Job("tight", *one) for one in each]
    found += [Job("tight", *one, share=0.5) for one in each]
    found += [Job("matched", *one, share=0.25) for one in each]
    found += [Job("pure", *one, budgets=OTHER_BUDGETS) for one in each]
    return found


@cache
def runs_on(method: str, model: str) -> bool:
    """Whether a model's vision tower has the attention that a method may need."""
    if not method_class(method.partition(",")[0]).needs_attention:
        return True
    config = ModelHandle(model, None, RunOptions()).config
    return family_of(config).class_attention(config) is not None


def needs(job: Job, others: Iterable[Job]) -> list[Job]:
    """The jobs whose results a job looks at."""
    if job.part not in ("matched", "tight") or job.share is None:
        return []
    wanted = (job.model, job.seed, job.share)
    return [
        each
        for each in others
        if each.part == "composed" and (each.model, each.seed, each.share) == wanted
    ]


@dataclass
class Pool:
    """Runs jobs side by side.

    Attributes:
        folder: Where results go.
        options: Of single jobs, and of the pool.
        waiting: Jobs that have not started.
        running: Processes, their jobs and when they started.
        taken: Seconds that finished jobs took over what was expected, by part and model.
    """

    folder: Path
    options: argparse.Namespace
    waiting: list[Job]
    running: dict[Any, tuple[Job, float]] = field(default_factory=dict)
    taken: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    begun: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Run until nothing is left, or the deadline."""
        while self.waiting or self.running:
            while len(self.running) < self.options.workers:
                job = self._next()
                if job is None:
                    break
                self.waiting.remove(job)
                process = multiprocessing.Process(
                    target=_work, args=(job, self.folder, self.options)
                )
                process.start()
                self.running[process] = (job, time.monotonic())
            if not self.running:
                break
            sentinels = [each.sentinel for each in self.running]
            multiprocessing.connection.wait(sentinels, timeout=min(1.0, max(self._left(), 0)))
            self._reap()
            if self._left() <= 0:
                break
        self._stop()

    def _left(self) -> float:
        deadline = self.options.deadline
        return 1e9 if deadline is None else deadline - (time.monotonic() - self.begun)

    def _next(self) -> Job | None:
        """The first job that may start and is expected to end."""
        unfinished = {*self.waiting, *(job for job, _ in self.running.values())}
        for job in self.waiting:
            if not needs(job, unfinished) and SLACK * self._expected(job) < self._left():
                return job
        return None

    def _expected(self, job: Job) -> float:
        """Seconds that a job will take: as others of its kind, else of its model, else of any."""
        groups: list[Callable[[tuple[str, str]], bool]] = [
            lambda key: key == (job.part, job.model),
            lambda key: key[1] == job.model,
            lambda key: True,
        ]
        for is_alike in groups:
            found = [each for key, many in self.taken.items() if is_alike(key) for each in many]
            if found:
                return SECONDS[job.part] * statistics.mean(found)
        return float(SECONDS[job.part])

    def _reap(self) -> None:
        for process in [each for each in self.running if not each.is_alive()]:
            process.join()
            job, started = self.running.pop(process)
            seconds = time.monotonic() - started
            if process.exitcode == 0:
                self.taken[job.part, job.model].append(seconds / SECONDS[job.part])
            result = "done" if process.exitcode == 0 else f"FAILED, see {job.name}.log"
            self._say(f"{job.name}: {result} in {seconds:.0f} s")

    def _stop(self) -> None:
        for process, (job, _) in self.running.items():
            process.terminate()
            process.join()
            self._say(f"{job.name}: stopped at the deadline")
        for job in self.waiting:
            self._say(f"{job.name}: not started")

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:5.0f} s  {text}", flush=True)


def _work(job: Job, folder: Path, options: argparse.Namespace) -> None:
    """One process: a job, its messages in a log."""
    log = folder / f"{job.name}.log"
    options.output, options.results = folder / f"{job.name}.json", folder
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                single.run(job, options, show=False)
            except Exception as error:
                traceback.print_exc(file=file)
                raise SystemExit(1) from error
    log.unlink()


# Tables.


def collect(folder: Path) -> None:
    """Print all tables of a folder's results."""
    rows = single.read_rows(folder)
    for model in sorted({row["model"] for row in rows}, key=_place):
        own = [row for row in rows if row["model"] == model]
        _alone_table(model, own)
        _table(f"{model}: what PAR's steps are worth", _of(own, "ablation"), _named)
        for budget in sorted({row["budget"] for row in own if row["part"] == "composed"}):
            _composed_table(model, budget, own)


def _place(model: str) -> tuple[int, str]:
    return (MODELS.index(model) if model in MODELS else len(MODELS), model)


def _of(rows: Iterable[Row], *parts: str) -> list[Row]:
    return [row for row in rows if row["part"] in parts]


def _alone_table(model: str, rows: list[Row]) -> None:
    """Methods alone, and below each share pure plans of about the same FLOPs."""
    alone, plans = _of(rows, "alone"), _of(rows, "pure")
    shown = [row for row in alone if row.get("share") is None]
    for share in single.SHARES:
        shown += [row for row in alone if row.get("share") == share]
        shown += [row for row in plans if row["budget"] == share]
    _table(f"{model}: methods alone, and plans without a reduction", shown, _named)


def _composed_table(model: str, budget: float, rows: list[Row]) -> None:
    """Plans of one budget, with a reduction and without; then at equal KV bytes."""
    own = [row for row in rows if row.get("budget") == budget]
    free = [row for row in own if row.get("kv_budget") is None]
    head = f"{model}: plans at {100 * budget:g} % of the visual FLOPs"
    _table(head, _of(free, "pure") + _by_share(_of(free, "composed")), _named)
    few = [row for row in own if row.get("kv_budget") is not None]
    pairs: list[Row] = []
    for row in _by_share(_of(few, "matched")):
        key = (row["seed"], row["share"], row["best"])
        pairs += [
            {**each, "best": row["best"]}
            for each in _of(free, "composed")
            if (each["seed"], each["share"], each["method"]) == key
        ]
        pairs.append(row)
    _table(f"{head}, and at the KV bytes of the best composition", pairs, _matched_name)
    tight = _of(few, "tight")
    _table(f"{head} and {100 * single.TIGHT_KV:g} % of the KV bytes", tight, _tight_name)


def _by_share(rows: list[Row]) -> list[Row]:
    """Rows by share, then in the order of the methods."""
    return sorted(rows, key=lambda row: (-row["share"], _rank(row["method"])))


def _rank(method: str | None) -> int:
    return COMPOSED.index(method) if method in COMPOSED else len(COMPOSED)


def _named(row: Row) -> str:
    if "missing" in row:
        share = "" if row.get("share") is None else f" {100 * row['share']:g} %"
        return f"{row.get('method') or 'plan'}{share}"
    if row["part"] == "pure":
        return f"all tokens, plan at {100 * row['budget']:g} %"
    if row["part"] == "composed":
        return f"{row['reduction']}, plan"
    return row["reduction"] or "all tokens"


def _matched_name(row: Row) -> str:
    share = f"{100 * row['share']:g} %"
    if row["part"] == "composed":
        return f"the best reduction to {share}, plan"
    return f"all tokens, plan with as few KV bytes as that to {share}"


def _tight_name(row: Row) -> str:
    if row["share"] is None:
        return "all tokens, plan"
    return f"the best reduction to {100 * row['share']:g} %, plan"


def _table(heading: str, rows: Sequence[Row], name: Callable[[Row], str]) -> None:
    """Print rows, those of one name together: mean over seeds, least .. most."""
    groups: dict[str, list[Row]] = defaultdict(list)
    missing: dict[str, list[str]] = {}
    for row in rows:
        groups[name(row)].append(row)
    if not groups:
        return
    seeds = {row["seed"] for row in rows}
    print(f"\n{heading} ({max(row.get('pairs', 0) for row in rows)} pairs, {len(seeds)} seeds)\n")
    print("| | tokens | FLOPs, % | KV, % | whole answers, % | worst kind, % | KL |")
    print("|---|" + "---:|" * 6)
    for label, found in groups.items():
        good = [row for row in found if "missing" not in row]
        if not good:
            missing.setdefault(found[0]["missing"], []).append(label)
            continue
        methods = sorted({row["best"] for row in good if row.get("best")})
        if methods:
            label += f" ({', '.join(methods)})"
        tokens = sorted({(row["tokens"], row["of"]) for row in good})
        cells = [
            ", ".join(f"{kept} of {whole}" for kept, whole in tokens),
            _spread(good, "flops", 100, "{:.1f}"),
            _spread(good, "kv", 100, "{:.1f}"),
            _spread(good, "whole", 100, "{:.1f}"),
            _spread(good, "worst", 100, "{:.1f}"),
            _spread(good, "kl", 1, "{:.4f}"),
        ]
        some = "" if len(good) == len(seeds) else f" ({len(good)} of {len(seeds)} seeds)"
        print(f"| {label}{some} | {' | '.join(cells)} |")
    for reason, labels in missing.items():
        print(f"\nLeft out: {', '.join(labels)}: {reason}")


def _spread(rows: Sequence[Row], key: str, factor: float, form: str) -> str:
    values = [factor * row[key] for row in rows]
    mean, least, most = (
        form.format(each) for each in (statistics.mean(values), min(values), max(values))
    )
    return mean if least == most else f"{mean} ({least} .. {most})"


def main() -> None:
    """Run, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "collect", "list"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("reduction-results"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--deadline", type=float, help="seconds; nothing runs longer")
    single.add_numbers(parser)
    options = parser.parse_args()
    if options.action == "collect":
        collect(options.folder)
        return
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork")  # torch is imported once
    every = jobs(options.models, options.seeds)
    if options.action == "list":
        print("\n".join(job.name for job in every))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    todo = [job for job in every if not (options.folder / f"{job.name}.json").exists()]
    Pool(options.folder, options, todo).run()


if __name__ == "__main__":
    main()
