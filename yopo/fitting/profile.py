"""The importance of what visual tokens compute in every layer, from one walk of the dense model.

These scores need the covariance of a layer's inputs, so a single streaming pass cannot compute
them: what attention adds beyond a linear map of a token's own state, how narrow a bottleneck the
projections tolerate, and how much of a layer's update a linear map of some rank explains.
Only one layer's moments are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import torch
from transformers import PreTrainedModel

from yopo.fitting.layerwise import DenseBatch, DenseWalk, own_matrix
from yopo.fitting.least_squares import (
    Gram,
    Moments,
    Projections,
    explained,
    explained_in_all,
    ridge,
)
from yopo.models.devices import device_of
from yopo.models.offloaded import at_hand
from yopo.plans.schema import ModelShape, full_layer
from yopo.runtime.weights import Extras, VisualLayer
from yopo.support.ranks import gathered
from yopo.support.work_dir import NoWork, Stage, Work


@dataclass(frozen=True)
class Profile:
    """Energies over visual tokens; float64. L layers, H query heads, d hidden width.

    They are relative to the energy of the residual stream *after* the layer: an error is read as a
    part of that stream, and a first layer that gets small embeddings can raise it by a factor of
    thousands.

    Attributes:
        mixing: (L, H), a head's contribution from other tokens: the energy of its output after the
            output projection that no affine map of the token's own normed state predicts.
        bottleneck_residual: (L, d + 1), share of the variance of queries, keys and values
            that a bottleneck of rank 0, 1, ..., d loses.
        map_residual: (L, d + 1), energy of a layer's update that an affine map of rank
            0, 1, ..., d of the normed state does not explain.
        nonlinear_residual: (L,), energy of the FFN's output that no affine map of its input
            predicts.
        stream: (L + 1,), squared norm of the residual stream before every layer and after the
            last: the geometric mean over tokens, since a few of massive norm rule any other.
    """

    mixing: torch.Tensor
    bottleneck_residual: torch.Tensor
    map_residual: torch.Tensor
    nonlinear_residual: torch.Tensor
    stream: torch.Tensor


_ENERGIES = ("mixing", "bottleneck_residual", "map_residual", "nonlinear_residual")


@torch.no_grad()
def profile(
    model: PreTrainedModel,
    batches: Sequence[DenseBatch],
    shape: ModelShape,
    work: Work | None = None,
) -> Profile:
    """Profile a dense model on prompts that :func:`~yopo.fitting.layerwise.enter` took in.

    Args:
        model: The dense model, in memory.
        batches: The prompts.
        shape: The decoder's dimensions.
        work: Keeps the energies of finished layers.
    """
    walk = DenseWalk(model, batches)
    work = work or NoWork()
    places = [device_of(layer) for layer in walk.decoder.layers]
    stream, rows = [_energy(walk, places[0])], []
    for number, place in enumerate(places):
        kept = work.load(f"profile-{number:03}")
        if kept is None:
            with at_hand(walk.decoder.layers[number]):
                parts = _profile_layer(walk, number, shape)
            work.save(f"profile-{number:03}", Stage(dict(zip(_ENERGIES, parts, strict=True))))
        else:
            walk.skip(number)
            parts = tuple(kept.tensors[name] for name in _ENERGIES)
        stream.append(_energy(walk, place))
        mixing, bottleneck, mapped, nonlinear = (each.cpu() for each in parts)
        after = stream[-1]
        rows.append((mixing / after, bottleneck, mapped / after, nonlinear / after))
    mixing, bottleneck, mapped, nonlinear = map(torch.stack, zip(*rows, strict=True))
    energies = torch.tensor(stream, dtype=torch.float64)
    return Profile(mixing, bottleneck, mapped, nonlinear, energies)


def _energy(walk: DenseWalk, place: torch.device) -> float:
    """Geometric mean of the squared norms of the visual states before the next layer."""
    found = []
    for batch in walk.batches:
        norms = batch.visual(batch.hidden.to(place)).float().square().sum(dim=1).clamp(min=1e-30)
        found.append((float(norms.log().sum(dtype=torch.float64)), len(norms)))
    total, count = 0.0, 0
    for logarithms, tokens in gathered(found):
        total, count = total + logarithms, count + tokens
    return exp(total / count)


def _profile_layer(walk: DenseWalk, number: int, shape: ModelShape) -> tuple[torch.Tensor, ...]:
    """The four energies of one layer, not yet relative to one; advances the walk past it."""
    layer, names = walk.decoder.layers[number], walk.names
    device, width = device_of(layer), shape.heads * shape.head_dim
    heads = Moments(shape.hidden, width, device)
    outputs = Moments(width, 0, device)
    update = Moments(shape.hidden, shape.hidden, device)
    ffn = Moments(shape.hidden, shape.hidden, device)
    energies: list[tuple[float, float, int]] = []
    attended: list[torch.Tensor] = []
    handle = getattr(layer.self_attn, names.output).register_forward_pre_hook(
        lambda module, args: attended.append(args[0])
    )
    attention_norm, ffn_norm = getattr(layer, names.attention_norm), getattr(layer, names.ffn_norm)
    try:
        for batch, (before, each) in zip(walk.batches, walk.steps(number), strict=True):
            mixed = batch.visual(attended.pop())
            heads.add(attention_norm(before), mixed)
            outputs.add(mixed)
            update.add(ffn_norm(before), each.after - before)
            ffn.add(ffn_norm(each.middle), each.after - each.middle)
            changed, added = _squared(each.after - before), _squared(each.after - each.middle)
            energies.append((changed, added, len(mixed)))
    finally:
        handle.remove()
    change, ffn_energy, count = 0.0, 0.0, 0
    for changed, added, tokens in gathered(energies):
        change, ffn_energy, count = change + changed, ffn_energy + added, count + tokens
    change, ffn_energy = change / count, ffn_energy / count
    stock = VisualLayer(layer, full_layer(shape), shape, names, Extras())  # its own projections
    inputs, updated, fed = heads.gram(), update.gram(), ffn.gram()
    mixing = _mixing(inputs, outputs.gram(), stock, shape)
    bottleneck = _bottleneck_residual(inputs, stock)
    left = change - float(updated.target_mean.square().sum())
    mapped = _tail(left, explained(updated), shape.hidden)
    straight = float(fed.target_mean.square().sum()) + explained_in_all(fed)
    nonlinear = torch.tensor(max(ffn_energy - straight, 0.0), dtype=torch.float64)
    return mixing, bottleneck, mapped, nonlinear


def _squared(states: torch.Tensor) -> float:
    return float(states.float().square().sum(dtype=torch.float64))


def _bottleneck_residual(inputs: Gram, stock: VisualLayer) -> torch.Tensor:
    weights = [own_matrix(stock, name)[0] for name in ("query", "key", "value")]
    return Projections(inputs, weights).residual_by_rank()


def _mixing(inputs: Gram, outputs: Gram, stock: VisualLayer, shape: ModelShape) -> torch.Tensor:
    """(heads,) energy after the output projection that the token's own state does not predict."""
    weight, _ = ridge(inputs)
    rest = outputs.covariance - weight @ inputs.cross
    out = own_matrix(stock, "output")[0].to(rest).unflatten(1, (shape.heads, shape.head_dim))
    blocks = rest.unflatten(0, (shape.heads, shape.head_dim))
    blocks = blocks.unflatten(2, (shape.heads, shape.head_dim))
    energies = [
        torch.einsum("di,ij,dj->", out[:, head], blocks[head, :, head], out[:, head])
        for head in range(shape.heads)
    ]
    return torch.stack(energies).clamp(min=0)


def _tail(total: float, parts: torch.Tensor, width: int) -> torch.Tensor:
    """(width + 1,) remainder of a total without its 0, 1, ... largest parts."""
    left = total - torch.cat([parts.new_zeros(1), parts.cumsum(0)])
    return left.clamp(min=0)[: width + 1]
