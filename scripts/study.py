"""Measure how much each method keeps at a visual budget, over calibration seeds, on held-out pairs.

Every result is appended to a JSON-lines file as soon as it is available, and results that the file
already holds are not run again; `scripts/study_report.py` makes tables and a plot from it.

    python scripts/study.py methods --model llava-tiny --output study.jsonl
    python scripts/study.py ablation --model llava-tiny --output study.jsonl
    python scripts/study.py sizes --model llava-tiny --output study.jsonl
    python scripts/study.py shift --model llava-tiny --calibration demo:glyphs-calibration ...
    python scripts/study.py deeper --model llava-tiny --budgets 0.05 --output study.jsonl
    python scripts/study.py kv --model llava-tiny --budgets 0.12 --output study.jsonl
    python scripts/study.py long --model llava-tiny --kind description
    python scripts/study.py sizes-of-images --model internvl-tiny --output study.jsonl

Pairs are those of the model's own task unless ``--calibration`` and ``--heldout`` name others.

All methods use the same visual FLOPs, or the nearest amount below that they can reach:

* ``paper+random``: the paper's shape with random heads and neurons.
* ``authors``: the rules of the paper's released code: half of the layers, heads by threshold and
  vote, the first neurons, radius 2.
* ``paper``: the same shape with heads by mean activity and neurons by importance.
* ``paper+refit``: the same with output and down projections fitted for visual tokens.
* ``search``: the best template, improved layer by layer by measured KL; no fitted weights.
* ``allocated``: the default of `yopo calibrate --budget`: measured scores, fitted weights.
* ``allocated+search``: that plan improved as by `yopo search` (study ``deeper``).
* ``vtw``, ``fastv``, ...: baselines (``yopo.baselines.registry``), which need no calibration.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from yopo.baselines.install import baseline
from yopo.baselines.registry import solve, with_own_budget
from yopo.data.pairs import Pairs
from yopo.data.sizes import in_sizes
from yopo.data.sources import open_pairs
from yopo.demo.pair_files import write_pairs
from yopo.evaluation.evaluate import measure_kept
from yopo.evaluation.fidelity import record_dense
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.session import CalibrationSession
from yopo.planning.levers import Levers
from yopo.planning.paper import paper_layers
from yopo.planning.planner import Planner
from yopo.planning.request import BudgetRequest
from yopo.planning.templates import Layers, TemplateBuilder, random_rho
from yopo.plans.flops import visual_budget
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned
from yopo.strategies.neighbors import PAPER_RADIUS
from yopo.support.errors import YopoError

BUDGETS = (0.05, 0.12, 0.25, 0.5)
SEEDS = (0, 1, 2)
SEARCH_RUNS = 100
SIZES = (16, 32, 128, 512)
KV_BUDGETS = (1.0, 0.5, 0.25, 0.12)

TASKS = {
    "llava-tiny": ("demo:calibration", "demo:heldout", 8),
    "qwen2-vl-tiny": ("demo:glyphs-calibration", "demo:glyphs-heldout", 12),
    "internvl-tiny": ("demo:tickets-calibration", "demo:tickets-heldout", 16),
}
"""Of each demo model: pairs to calibrate and to evaluate on, and tokens of the longest answer."""

SCALES = ("1", "1,1.5")
"""Factors of the sides of calibration images that the study of image sizes compares."""

ABLATIONS = {
    "everything": Levers(),
    "no bottleneck": Levers(ranks=()),
    "no linear map": Levers(maps=(0.0,)),
    "no partial FFN": Levers(widths=(0.0, 1.0)),
    "no visual attention": Levers(attend=False),
    "bottleneck alone": Levers(maps=(0.0,), widths=(0.0, 1.0), attend=False),
}
"""The levers that an allocation may use, per row of the ablation."""

Change = Callable[[], AbstractContextManager[object]]


class Results:
    """A JSON-lines file of results, one per key."""

    def __init__(self, path: Path):
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {json.dumps(json.loads(line)["key"]) for line in lines}

    def has(self, key: dict) -> bool:
        """Whether the file already holds a result."""
        return json.dumps(key) in self._known

    def add(self, key: dict, result: dict) -> None:
        """Append a result."""
        self._known.add(json.dumps(key))
        with self._path.open("a") as file:
            file.write(json.dumps({"key": key, **result}) + "\n")
        print(json.dumps(key), json.dumps(result.get("summary", result)), flush=True)


class Study:
    """One model, its held-out pairs, and a session per calibration seed."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.results = Results(options.output)
        self._sessions: dict[tuple, CalibrationSession] = {}
        self._records = None

    def session(
        self,
        seed: int,
        samples: int | None = None,
        data: str | None = None,
        grids: tuple[float, ...] = (1.0,),
    ) -> CalibrationSession:
        """Return the session for a seed, number of pairs, data and sizes, calibrated only once."""
        samples = samples or self.options.samples
        key = (seed, samples, data, grids)
        if key not in self._sessions:
            run = RunOptions(
                data=data or self.options.calibration,
                samples=samples,
                seed=seed,
                batch_size=32,
                max_new_tokens=self.options.max_new_tokens,
            )
            fit_options = FitOptions(measure_pairs=min(64, samples), fit_pairs=samples, grids=grids)
            self._sessions[key] = CalibrationSession(self.options.model, run, fit_options)
        return self._sessions[key]

    def records(self, session: CalibrationSession):
        """Return the dense model's answers on the held-out pairs."""
        if self._records is None:
            pairs = self._heldout()
            self._records = record_dense(
                session.model,
                session.processor,
                pairs,
                batch_size=32,
                max_new_tokens=self.options.max_new_tokens,
            )
        return self._records

    @property
    def heldout(self) -> str:
        """The name of the held-out pairs, and the factor of their images' sides."""
        scale = self.options.heldout_scale
        return self.options.heldout + ("" if scale == 1 else f" x {scale:g}")

    def _heldout(self) -> Pairs:
        heldout, count, kind = self.options.heldout, self.options.pairs, self.options.kind
        if kind:
            folder = Path(tempfile.mkdtemp())
            name = heldout.removeprefix("demo:")
            heldout = str(write_pairs(folder, name, count, seed=1, kinds=(kind,)))
        return in_sizes(open_pairs(heldout, samples=count, seed=1), (self.options.heldout_scale,))

    def measure(
        self, key: dict, session: CalibrationSession, change: Change, budget: float
    ) -> None:
        """Evaluate a changed model on the held-out pairs and store the result."""
        kept = measure_kept(
            session.model,
            session.processor,
            self.records(session),
            change,
            max_new_tokens=self.options.max_new_tokens,
        )
        accuracy = kept.accuracy
        summary = {
            "reached": round(budget, 4),
            "accuracy": accuracy.pruned / accuracy.total,
            "of_dense": accuracy.pruned / accuracy.dense,
            "same": kept.same_answers / kept.pairs,
            "agreement": kept.fidelity.agreement,
            "kl": kept.fidelity.kl,
        }
        kinds = {kind: asdict(each.accuracy) for kind, each in kept.by_kind.items()}
        self.results.add(key, {"summary": summary, "kinds": kinds, "pairs": kept.pairs})

    def plan(self, key: dict, session: CalibrationSession, make: Callable[[], PruningPlan]) -> None:
        """Make a plan and measure it; a budget that cannot be met is stored as missing."""
        if self.results.has(key):
            return
        try:
            plan = make()
        except YopoError as error:
            self.results.add(key, {"missing": error.message})
            return
        change = partial(pruned, session.model, plan, check=False)
        self.measure(key, session, change, visual_budget(plan))

    def key(self, study: str, method: str, budget: float, seed: int, **more: object) -> dict:
        """Return the key that identifies a result."""
        model = {"study": study, "model": self.options.model}
        return {**model, "method": method, "budget": budget, "seed": seed, **more}


def methods(study: Study) -> None:
    """Measure every method at every budget, over seeds."""
    for seed in study.options.seeds:
        session = study.session(seed)
        for budget in study.options.budgets:
            for name in study.options.methods or METHODS:
                key = study.key("methods", name, budget, seed)
                study.plan(key, session, partial(METHODS[name], session, budget))
            for name in with_own_budget() if seed == study.options.seeds[0] else ():
                measure_baseline(study, session, name, budget)


def measure_baseline(study: Study, session: CalibrationSession, name: str, budget: float) -> None:
    """Measure a baseline at a budget; baselines need no calibration, so there is one seed."""
    key = study.key("methods", name, budget, 0)
    if study.results.has(key):
        return
    model, workload = session.statistics.model, session.statistics.workload
    try:
        method = solve(name, model.shape, workload, budget)
        change = partial(baseline, session.model, method)
        study.measure(key, session, change, method.reached(model.shape, workload))
    except YopoError as error:
        study.results.add(key, {"missing": error.message})


def ablation(study: Study) -> None:
    """Measure allocations that may not use some of the levers."""
    for seed in study.options.seeds:
        session = study.session(seed)
        for budget in study.options.budgets:
            for name, levers in ABLATIONS.items():
                key = study.key("ablation", name, budget, seed)
                study.plan(key, session, partial(allocated, session, budget, levers))


def sizes(study: Study) -> None:
    """Measure how few calibration pairs suffice."""
    for seed in study.options.seeds:
        for samples in SIZES:
            for budget in study.options.budgets:
                key = study.key("sizes", "allocated", budget, seed, samples=samples)
                if not study.results.has(key):
                    session = study.session(seed, samples)
                    study.plan(key, session, partial(allocated, session, budget))


def shift(study: Study) -> None:
    """Calibrate on pairs from a different distribution than the held-out ones."""
    for seed in study.options.seeds:
        session = study.session(seed, data=study.options.calibration)
        for budget in study.options.budgets:
            more = {"calibration": study.options.calibration, "heldout": study.options.heldout}
            key = study.key("shift", "allocated", budget, seed, **more)
            study.plan(key, session, partial(allocated, session, budget))


def sizes_of_images(study: Study) -> None:
    """Calibrate on small images, some of them resized, and evaluate on large ones."""
    for seed in study.options.seeds:
        for scales in study.options.scales:
            factors = tuple(float(each) for each in scales.split(","))
            session = study.session(seed, data=study.options.calibration, grids=factors)
            for budget in study.options.budgets:
                more = {"grids": f"sides x {scales}", "heldout": study.heldout}
                key = study.key("sizes-of-images", "allocated", budget, seed, **more)
                study.plan(key, session, partial(allocated, session, budget))


def rho(study: Study) -> None:
    """Rank the heads of the paper's shape by the mean of rho over the pairs, or by its median."""
    for seed in study.options.seeds:
        session = study.session(seed)
        means = replace(session.statistics, rho=session.statistics.rho.mean(dim=0, keepdim=True))
        for budget in study.options.budgets:
            request = BudgetRequest(budget, template="paper", compensation="none")
            for name, statistics in (("mean", means), ("median", session.statistics)):
                key = study.key("rho", f"{name} of rho", budget, seed)
                planner = Planner(statistics, request, None, None)
                study.plan(key, session, lambda planner=planner: planner.make()[0])


def kv(study: Study) -> None:
    """Measure allocations that may keep only part of the visual KV cache."""
    for seed in study.options.seeds:
        session = study.session(seed)
        for budget in study.options.budgets:
            for share in KV_BUDGETS:
                key = study.key("kv", "allocated", budget, seed, kv_budget=f"{share:.0%} of the KV")
                make = partial(allocated, session, budget, kv_budget=share)
                study.plan(key, session, make)


def deeper(study: Study) -> None:
    """Improve allocations by a search, on the pairs of ``methods``."""
    for seed in study.options.seeds:
        session = study.session(seed)
        for budget in study.options.budgets:
            key = study.key("deeper", "allocated+search", budget, seed)
            study.plan(key, session, partial(searched, session, budget))


def long(study: Study) -> None:
    """Measure whether long answers of one kind stay identical to the dense model's to the end."""
    for seed in study.options.seeds:
        session = study.session(seed)
        for budget in study.options.budgets:
            for name in ("paper", "search", "allocated"):
                key = study.key("long", name, budget, seed, kind=study.options.kind)
                study.plan(key, session, partial(METHODS[name], session, budget))


def authors(session: CalibrationSession, budget: float) -> PruningPlan:
    """Apply the released rules, scaled to a budget by one ratio for heads and neurons."""
    statistics, shape = session.statistics, session.statistics.model.shape
    builder = TemplateBuilder(statistics, budget)
    half = shape.layers // 2
    seen = statistics.rho[:, :half].flatten(1)

    def build(ratio: float) -> Layers:
        # The threshold at which this share of the heads wins the vote (40 % of the samples).
        winning = seen.quantile(0.6, dim=0)
        alpha = float(winning.quantile(1 - ratio)) if ratio < 1 else 0.0
        return paper_layers(
            shape,
            statistics.rho,
            visual_layers=half,
            head_ratio=1.0,
            neuron_ratio=ratio,
            radius=PAPER_RADIUS,
            alpha=alpha,
        )

    layers = builder.scale(build)
    if layers is None:
        raise YopoError(f"The authors' shape does not fit a budget of {budget}.")
    plan = planner(session, BudgetRequest(budget)).assemble(layers, "none")
    identity = torch.arange(shape.ffn).expand(shape.layers, -1).clone()
    return replace(plan, tensors=replace(plan.tensors, neuron_order=identity))


def paper(session: CalibrationSession, budget: float, compensation: str = "none") -> PruningPlan:
    """Make a plan in the paper's shape, with heads and neurons chosen by scores."""
    return session.make(BudgetRequest(budget, template="paper", compensation=compensation)).plan


def search(session: CalibrationSession, budget: float) -> PruningPlan:
    """Make the best template without compensation, improved by a search."""
    return session.make(BudgetRequest(budget, compensation="none", search=SEARCH_RUNS)).plan


def allocated(
    session: CalibrationSession,
    budget: float,
    levers: Levers | None = None,
    kv_budget: float | None = None,
) -> PruningPlan:
    """Allocate a budget by measured scores, with fitted weights."""
    chosen = planner(session, BudgetRequest(budget, compensation="refit", kv_budget=kv_budget))
    chosen.levers = levers or Levers()
    plan, _ = chosen.make()
    return plan


def searched(session: CalibrationSession, budget: float) -> PruningPlan:
    """Make an allocation, improved by a search with as many runs as the templates get."""
    return session.make(BudgetRequest(budget, compensation="refit", search=SEARCH_RUNS)).plan


def planner(session: CalibrationSession, request: BudgetRequest) -> Planner:
    """Build a session's planner."""
    return Planner(session.statistics, request, session.kl, session.fitter)


def random(session: CalibrationSession, budget: float) -> PruningPlan:
    """Make a plan in the paper's shape, with heads and neurons chosen by random scores."""
    shuffled = random_rho(session.statistics, session.options.seed)
    request = BudgetRequest(budget, template="paper", compensation="none")
    plan, _ = Planner(shuffled, request, None, None).make()
    return plan


METHODS: dict[str, Callable[[CalibrationSession, float], PruningPlan]] = {
    "paper+random": random,
    "authors": authors,
    "paper": paper,
    "paper+refit": partial(paper, compensation="refit"),
    "search": search,
    "allocated": allocated,
}

STUDIES: dict[str, Callable[[Study], None]] = {
    "methods": methods,
    "ablation": ablation,
    "sizes": sizes,
    "shift": shift,
    "sizes-of-images": sizes_of_images,
    "deeper": deeper,
    "rho": rho,
    "kv": kv,
    "long": long,
}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--model", choices=TASKS, default="llava-tiny")
    parser.add_argument("--calibration", help="pairs to calibrate on")
    parser.add_argument("--heldout", help="pairs to evaluate on")
    parser.add_argument("--heldout-scale", type=float, default=1.0, help="of images' sides")
    parser.add_argument(
        "--scales", nargs="+", default=SCALES, help="of the sides of calibration images"
    )
    parser.add_argument("--kind", help="use only demo pairs of this kind")
    parser.add_argument("--samples", type=int, default=256, help="calibration pairs")
    parser.add_argument("--pairs", type=int, default=512, help="held-out pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only some")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer")
    parser.add_argument("--output", type=Path, default=Path("study.jsonl"))
    options = parser.parse_args()
    calibration, heldout, tokens = TASKS[options.model]
    options.calibration = options.calibration or calibration
    options.heldout = options.heldout or heldout
    options.max_new_tokens = options.max_new_tokens or tokens
    return options


def main() -> None:
    """Run a study."""
    options = arguments()
    STUDIES[options.study](Study(options))


if __name__ == "__main__":
    main()
