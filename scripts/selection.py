"""Compare four orders of neurons to keep when the down projection after them is fitted.

Prints a markdown table of the FFN's relative output error on visual tokens of held-out pairs,
averaged over layers, first with only the kept neurons, then with a linear map of the FFN's input
as well:

    python scripts/selection.py --model llava-tiny

* ``importance``: ``||W_down[:, j]||^2 E[a_j^2]``, what plans use;
* ``variance``: the same with the variance in place of the second moment (FLAP);
* ``OBS at once``: ``||W_down[:, j]||^2 / [H^-1]_jj``, the cost of removing only j and refitting;
* ``OBS greedy``: removes the cheapest one at a time and updates weights and inverse in between.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from yopo.data.prompts import Batch, batches, encode_for
from yopo.data.sources import open_pairs
from yopo.fitting.layerwise import DenseWalk, enter
from yopo.fitting.least_squares import Gram, Moments, ridge
from yopo.models.registry import family_of
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.session import CalibrationSession
from yopo.plans.schema import ModelShape, full_layer
from yopo.runtime.weights import Extras, VisualLayer

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)

Order = Callable[[Gram, torch.Tensor], torch.Tensor]
"""(moments of activations, (hidden, ffn) down projection) -> neurons, best first."""


def importance(gram: Gram, down: torch.Tensor) -> torch.Tensor:
    """Order neurons by the second moment of their activation."""
    square = gram.covariance.diagonal() + gram.input_mean.square()
    return (down.square().sum(dim=0) * square).argsort(descending=True)


def variance(gram: Gram, down: torch.Tensor) -> torch.Tensor:
    """Order neurons by the variance of their activation."""
    return (down.square().sum(dim=0) * gram.covariance.diagonal()).argsort(descending=True)


def obs_at_once(gram: Gram, down: torch.Tensor) -> torch.Tensor:
    """Order neurons by the cost of removing only that one and refitting the others."""
    inverse = torch.cholesky_inverse(gram.root)
    return (down.square().sum(dim=0) / inverse.diagonal()).argsort(descending=True)


def obs_greedy(gram: Gram, down: torch.Tensor) -> torch.Tensor:
    """Order neurons by repeatedly removing the cheapest."""
    inverse, down, gone = torch.cholesky_inverse(gram.root), down.clone(), []
    left = torch.arange(down.shape[1])
    while len(left) > 1:
        worst = int((down.square().sum(dim=0) / inverse.diagonal()).argmin())
        gone.append(int(left[worst]))
        keep = torch.arange(len(left)) != worst
        row = inverse[worst : worst + 1] / inverse[worst, worst]
        down = (down - down[:, worst : worst + 1] @ row)[:, keep]
        inverse = (inverse - inverse[:, worst : worst + 1] @ row)[keep][:, keep]
        left = left[keep]
    return torch.tensor([*gone, int(left[0])]).flip(0)


ORDERS: dict[str, Order] = {
    "importance": importance,
    "variance": variance,
    "OBS at once": obs_at_once,
    "OBS greedy": obs_greedy,
}


@torch.no_grad()
def grams(session: CalibrationSession, shape: ModelShape, encoded: list[Batch]) -> list[Gram]:
    """Return, per layer, the moments of (activations, normed input) and of the FFN's output."""
    walk, found = DenseWalk(session.model, enter(session.model, encoded)), []
    for number in range(shape.layers):
        layer = walk.decoder.layers[number]
        norm = getattr(layer, walk.names.ffn_norm)
        part = VisualLayer(layer, full_layer(shape), shape, walk.names, Extras())
        moments = Moments(shape.ffn + shape.hidden, shape.hidden)
        for states in walk.step(number):
            normed = norm(states.middle)
            inputs = torch.cat([part.activations(normed), normed], dim=1)
            moments.add(inputs, states.after - states.middle)
        found.append(moments.gram())
    return found


def error(fitted: Gram, seen: Gram, kept: torch.Tensor, down: torch.Tensor) -> float:
    """Relative error of the FFN's output on ``seen``, fitted on ``fitted`` from the kept inputs."""
    part = Gram(
        fitted.covariance[kept][:, kept],
        fitted.cross[kept],
        fitted.input_mean[kept],
        fitted.target_mean,
    )
    weight, _ = ridge(part)
    ffn = down.shape[1]
    total = (down @ seen.covariance[:ffn, :ffn] @ down.T).trace()
    explained = 2 * (weight @ seen.cross[kept]).trace()
    explained -= (weight @ seen.covariance[kept][:, kept] @ weight.T).trace()
    return float((total - explained) / total)


def encoded(session: CalibrationSession, data: str, samples: int, seed: int) -> list[Batch]:
    """Return the data's prompts as model inputs."""
    groups = batches(open_pairs(data, samples=samples, seed=seed), 32)
    return [encode_for(session.model, session.processor, group) for group in groups]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llava-tiny")
    parser.add_argument("--calibration", default="demo:calibration")
    parser.add_argument("--heldout", default="demo:heldout")
    parser.add_argument("--samples", type=int, default=128)
    options = parser.parse_args()
    run = RunOptions(data=options.calibration, samples=options.samples, batch_size=32)
    session = CalibrationSession(options.model, run, FitOptions())
    shape = session.statistics.model.shape
    fitted = grams(session, shape, encoded(session, options.calibration, options.samples, 0))
    seen = grams(session, shape, encoded(session, options.heldout, options.samples, 1))
    name = family_of(session.model.config).backbone(session.model.config).down
    layers = session.model.get_decoder().layers
    downs = [getattr(layer.mlp, name).weight.detach().double() for layer in layers]
    orders = {
        name: [order(gram.first(shape.ffn), down) for gram, down in zip(fitted, downs, strict=True)]
        for name, order in ORDERS.items()
    }
    print(f"| neurons of {shape.ffn} | {' | '.join(ORDERS)} | {' | '.join(ORDERS)} |")
    print("|---:|" + "---:|" * (2 * len(ORDERS)))
    inputs = torch.arange(shape.ffn, shape.ffn + shape.hidden)
    for count in (round(share * shape.ffn) for share in SHARES):
        cells = []
        for more in (inputs[:0], inputs):
            for name in ORDERS:
                errors = [
                    error(fitted[at], seen[at], torch.cat([orders[name][at][:count], more]), down)
                    for at, down in enumerate(downs)
                ]
                cells.append(f"{sum(errors) / len(errors):.4f}")
        print(f"| {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
