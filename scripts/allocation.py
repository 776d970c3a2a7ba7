"""Rank random allocations of one budget by what predicts their divergence on held-out pairs.

    python scripts/allocation.py ranking --model llava-tiny --output allocation.jsonl
    python scripts/allocation.py report --output allocation.jsonl

Every allocation is fitted and measured on held-out pairs. Then it is predicted, without these:

* ``estimate``: what the planner allocates by, at its best visual weight in hindsight;
* ``fisher``: ``E[(sum over layers of g . e)^2]``, where e is the error that the plan's layer makes
  on dense states, of text and of visual tokens, and g the gradient of the log-likelihood of sampled
  answer tokens; ``fisher, warm``: of tokens sampled at temperature 2, of that distribution;
* ``logits``: the same with g of the 16 leading logits, centred, with random signs: their squared
  change, which does not vanish where the model is certain;
* ``... by layer``: without terms between layers;
* ``KL, k pairs``: logit KL on k of the pairs that plans are compared on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from yopo.data.sources import open_pairs
from yopo.demo import demo_data
from yopo.evaluation.fidelity import Recorded, compare, record_dense
from yopo.fitting.layerwise import DenseWalk, enter
from yopo.fitting.pruned_batch import PrunedBatch, pruned_batches
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.session import CalibrationSession
from yopo.planning.allocate import Allocator
from yopo.planning.planner import Planner
from yopo.planning.request import BudgetRequest
from yopo.planning.templates import Layers, TemplateBuilder
from yopo.planning.weightings import VISUAL_WEIGHTS, Weighting
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned
from yopo.runtime.weights import Extras, VisualLayer

MODELS = ("llava-tiny", "qwen2-vl-tiny", "internvl-tiny")
DRAWS = 4
LEADING = 16
COUNTS = (8, 16, 32, 64)

Objective = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""(answer tokens, vocabulary) logits -> a random scalar whose gradient is wanted."""


def fisher(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Log-likelihood of sampled tokens."""
    log_probs = logits.log_softmax(dim=-1)
    sampled = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
    return log_probs.gather(1, sampled).sum()


def warm(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Log-likelihood of sampled tokens at temperature 2."""
    return fisher(logits / 2, generator)


def leading(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The leading logits over their mean, with random signs."""
    top = logits.topk(min(LEADING, logits.shape[1]), dim=1).values
    signs = torch.randint(0, 2, top.shape, generator=generator) * 2 - 1
    return ((top - top.mean(dim=1, keepdim=True)) * signs).sum()


OBJECTIVES: dict[str, Objective] = {"fisher": fisher, "fisher, warm": warm, "logits": leading}


@dataclass(frozen=True)
class Gradients:
    """Gradients with respect to every layer's output on one batch.

    Attributes:
        by_name: Objective -> for every draw, (layers, batch, sequence, hidden).
    """

    by_name: dict[str, list[torch.Tensor]]


def gradients(session: CalibrationSession, record: Recorded) -> Gradients:
    """Differentiate the dense model's predictions along its answers."""
    model, mask = session.model, record.batch.answer_mask
    outputs: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def note(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        outputs.append(output)
        return output

    handles = [layer.register_forward_hook(note) for layer in model.get_decoder().layers]
    try:
        with torch.enable_grad():
            states = model.base_model(**record.batch.inputs, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(states[:, :-1][mask[:, 1:]]).float()
            found = {
                name: [
                    torch.stack(
                        torch.autograd.grad(draw(logits, generator), outputs, retain_graph=True)
                    )
                    for _ in range(DRAWS)
                ]
                for name, draw in OBJECTIVES.items()
            }
    finally:
        for handle in handles:
            handle.remove()
    return Gradients(found)


@dataclass
class Predictor:
    """Predicts plans from gradients on the comparison pairs."""

    session: CalibrationSession
    records: list[Recorded]

    def __post_init__(self) -> None:
        """Differentiate once for all plans."""
        self.session.model.requires_grad_(False)
        self.gradients = [gradients(self.session, each) for each in self.records]
        self.entered = enter(self.session.model, [each.batch for each in self.records])

    @torch.no_grad()
    def predict(self, plan: PruningPlan) -> dict[str, float]:
        """Predict the divergence of a fitted plan, up to a factor for each objective."""
        walk = DenseWalk(self.session.model, self.entered)
        batches = pruned_batches(walk, plan)
        changes: dict[str, list[list[list[torch.Tensor]]]] = {
            name: [[[] for _ in range(DRAWS)] for _ in batches] for name in OBJECTIVES
        }
        for number in range(len(plan.layers)):
            before = [each.hidden for each in walk.batches]
            walk.step(number)
            for index, batch in enumerate(batches):
                error = layer_error(
                    walk, plan, number, batch, before[index], walk.batches[index].hidden
                )
                for name, draws in self.gradients[index].by_name.items():
                    for draw, gradient in enumerate(draws):
                        change = (gradient[number] * error).sum(dim=(1, 2))
                        changes[name][index][draw].append(change)
        found = {}
        for name, by_batch in changes.items():
            rows = torch.cat(
                [torch.stack(layers, dim=1) for draws in by_batch for layers in draws]
            )  # (pairs and draws, layers)
            found[name] = float(rows.sum(dim=1).square().mean())
            found[f"{name} by layer"] = float(rows.square().sum(dim=1).mean())
        return found


def layer_error(
    walk: DenseWalk,
    plan: PruningPlan,
    number: int,
    batch: PrunedBatch,
    before: torch.Tensor,
    after: torch.Tensor,
) -> torch.Tensor:
    """(batch, sequence, hidden) error of a plan's layer on dense states.

    Visual tokens that take no part any more have none: what is not read of them is an error of the
    text.
    """
    order, scale = plan.tensors.neuron_order, plan.tensors.key_scale
    extras = Extras(
        None if order is None else order[number],
        key_scale=None if scale is None else scale[number],
        refit=plan.tensors.refit.get(number, {}),
    )
    module = walk.decoder.layers[number]
    part = VisualLayer(module, plan.layers[number], plan.model.shape, walk.names, extras)
    layout, result = batch.dense.layout, after.clone()
    batch.text, batch.visual = layout.text.gather(before), layout.visual.gather(before)
    takes_part = number < plan.visual_depth
    visual = batch.given(part) if takes_part else None
    text, states = batch.run(walk, number, part)(batch.text, batch.text_rotary, visual)
    layout.text.scatter(result, text)
    if states is not None and number < plan.visual_depth - 1:
        layout.visual.scatter(result, states)
    return result - after


def estimates(planner: Planner, session: CalibrationSession, layers: Layers) -> dict[str, float]:
    """Return the planner's estimate at every visual weight that it tries first."""
    builder = TemplateBuilder(session.statistics, planner.request.budget)
    return {
        f"estimate, {weight:.3g}": Allocator(
            builder, session.fitter.profile, Weighting.even(weight, None, len(layers))
        ).damage(layers)
        for weight in VISUAL_WEIGHTS
    }


def drawn(planner: Planner, layers: int, count: int, random: Random) -> list[Layers]:
    """Allocate by random weightings, without duplicates."""
    found: dict[Layers, None] = {}
    for _ in range(20 * count):
        weighting = Weighting.even(10 ** random.uniform(0, 2), None, layers).varied(random)
        made = planner.allocate(weighting)
        if made is not None:
            found[made] = None
        if len(found) == count:
            break
    return list(found)


def ranking(options: argparse.Namespace) -> None:
    """Fit, measure and predict random allocations."""
    run = RunOptions(samples=options.samples, seed=options.seed)
    session = CalibrationSession(options.model, run, FitOptions())
    pairs = open_pairs(
        demo_data(options.model, "heldout"), samples=options.pairs, seed=options.seed + 100
    )
    heldout = record_dense(session.model, session.processor, pairs, batch_size=8, max_new_tokens=64)
    predictor = Predictor(session, session.comparison)
    shape = session.statistics.model.shape
    for budget in options.budgets:
        planner = Planner(session.statistics, BudgetRequest(budget), session.kl, session.fitter)
        for layers in drawn(planner, shape.layers, options.plans, Random(options.seed)):
            plan = planner.assemble(layers, "refit")
            with pruned(session.model, plan, check=False):
                seen = compare(session.model, session.comparison)
                held = compare(session.model, heldout)
            predicted = predictor.predict(plan) | estimates(planner, session, layers)
            tokens = [each.tokens for each in seen.by_pair]
            kls = [each.kl for each in seen.by_pair]
            for count in COUNTS:
                predicted[f"KL, {count} pairs"] = sum(kls[:count]) / sum(tokens[:count])
            row = {"model": options.model, "budget": budget, "seed": options.seed}
            row |= {"held": held.kl, "agreement": held.agreement, "predicted": predicted}
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")


def ranks(values: list[float]) -> torch.Tensor:
    """Return the ranks of values."""
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def spearman(first: list[float], second: list[float]) -> float:
    """Return the rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


def groups(rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Yield (heading, rows) of every model and budget."""
    for model in MODELS:
        for budget in sorted({row["budget"] for row in rows}):
            some = [row for row in rows if row["model"] == model and row["budget"] == budget]
            if some:
                yield f"{model}, {budget:.0%}", some


def report(options: argparse.Namespace) -> None:
    """Print rank correlations, and the divergence of the plan that each predictor chooses."""
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    found = list(groups(rows))
    print(f"| | {' | '.join(heading for heading, _ in found)} |")
    print("|---|" + "---:|" * len(found))
    for name in rows[0]["predicted"]:
        cells = []
        for _, some in found:
            predicted = [row["predicted"][name] for row in some]
            held = [row["held"] for row in some]
            chosen = held[predicted.index(min(predicted))]
            cells.append(f"{spearman(predicted, held):.2f} / {chosen / min(held):.1f}")
        print(f"| {name} | {' | '.join(cells)} |")
    best = (f"{min(r['held'] for r in some):.4f} of {len(some)}" for _, some in found)
    print(f"| least KL | {' | '.join(best)} |")


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("ranking", "report"))
    parser.add_argument("--model", choices=MODELS, default="llava-tiny")
    parser.add_argument("--samples", type=int, default=256, help="calibration pairs")
    parser.add_argument("--pairs", type=int, default=256, help="held-out pairs")
    parser.add_argument("--plans", type=int, default=50, help="allocations of every budget")
    parser.add_argument("--budgets", type=float, nargs="+", default=(0.05, 0.12))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("allocation.jsonl"))
    options = parser.parse_args()
    {"ranking": ranking, "report": report}[options.command](options)


if __name__ == "__main__":
    main()
