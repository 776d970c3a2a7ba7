"""The order of a baked checkpoint's heads and neurons, and the plan in the new numbering.

Kept heads come first, those in which visual tokens attend before the others, and neurons are in
order of importance, so that a plan's parts are slices of the weights. Dropped heads follow in order
of activity, so that smaller budgets are prefixes as well. Query heads stay in the group of their KV
head, so that the function is unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from yopo.plans.schema import LayerPlan, ModelShape, PruningPlan
from yopo.plans.tensors import PlanTensors, Refit


@dataclass(frozen=True, eq=False)
class BakedLayer:
    """The permutation of one layer: new position -> old index.

    Attributes:
        head_order: Query heads; heads of one group are adjacent, groups follow ``kv_order``.
        kv_order: KV heads.
        neuron_order: (ffn,) int64.
    """

    head_order: tuple[int, ...]
    kv_order: tuple[int, ...]
    neuron_order: torch.Tensor


def order_layers(plan: PruningPlan) -> list[BakedLayer]:
    """The permutation to bake, layer by layer.

    Args:
        plan: A plan that is not baked; without a neuron order, neurons are not moved.
    """
    shape = plan.model.shape
    untouched = torch.arange(shape.ffn)
    orders = plan.tensors.neuron_order
    layers = []
    for index, layer in enumerate(plan.layers):
        activity = plan.measured.rho[index] if plan.measured else (0.0,) * shape.heads
        head_order, kv_order = order_heads(layer, shape, activity)
        layers.append(
            BakedLayer(head_order, kv_order, untouched if orders is None else orders[index])
        )
    return layers


def order_heads(
    layer: LayerPlan, shape: ModelShape, activity: Sequence[float]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Order one layer's heads: attending first, then kept, more active first, then by index.

    Args:
        layer: Determines which query heads are kept, and in which visual tokens attend.
        shape: Decoder dimensions.
        activity: (heads,) mean activity of every query head; ties are ordered by index.

    Returns:
        (query heads, KV heads), each new position -> old index. KV heads with more kept query
        heads come first, then those with more attending ones.
    """
    kept, attending = set(layer.read_heads), set(layer.attend_heads)
    groups = []
    for kv_head in range(shape.kv_heads):
        members = range(kv_head * shape.group, (kv_head + 1) * shape.group)
        ordered = sorted(
            members,
            key=lambda head: (head not in attending, head not in kept, -activity[head], head),
        )
        most_active = max(activity[head] for head in members)
        counts = (-len(kept.intersection(members)), -len(attending.intersection(members)))
        groups.append((*counts, -most_active, kv_head, ordered))
    groups.sort()
    return (
        tuple(head for *_, ordered in groups for head in ordered),
        tuple(kv_head for *_, kv_head, _ in groups),
    )


def baked_plan(plan: PruningPlan, orders: Sequence[BakedLayer]) -> PruningPlan:
    """The same plan for the baked checkpoint, with heads in the new numbering.

    Its model is still the original one: the new fingerprint is only known once it is written.

    Args:
        plan: The plan before baking.
        orders: The baked permutations, one per layer.
    """
    layers = []
    for layer, order in zip(plan.layers, orders, strict=True):
        heads, attend = (
            tuple(new for new, old in enumerate(order.head_order) if old in chosen)
            for chosen in (layer.read_heads, layer.attend_heads)
        )
        layers.append(replace(layer, read_heads=heads, attend_heads=attend))
    measured = plan.measured
    if measured is not None:
        rho = tuple(
            tuple(row[old] for old in order.head_order)
            for row, order in zip(measured.rho, orders, strict=True)
        )
        measured = replace(measured, rho=rho)
    return replace(
        plan,
        layers=tuple(layers),
        baked=True,
        tensors=_baked_tensors(plan, orders),
        measured=measured,
        provenance={**plan.provenance, "baked_from": plan.model.fingerprint},
    )


def _baked_tensors(plan: PruningPlan, orders: Sequence[BakedLayer]) -> PlanTensors:
    """The tensors for a plan's compensation, in the baked checkpoint's order.

    The neuron order itself is no longer needed, and fitted down projections already follow it.
    """
    tensors = plan.needed_tensors
    shape = plan.model.shape
    refit = {
        index: _baked_refit(weights, plan.layers[index], orders[index], shape)
        for index, weights in tensors.refit.items()
    }
    neuron_mean, head_mean = tensors.neuron_mean, tensors.head_mean
    if neuron_mean is not None:
        neuron_mean = torch.stack(
            [mean[order.neuron_order] for mean, order in zip(neuron_mean, orders, strict=True)]
        )
    if head_mean is not None:
        head_mean = torch.stack(
            [mean[list(order.head_order)] for mean, order in zip(head_mean, orders, strict=True)]
        )
    key_scale = tensors.key_scale
    if key_scale is not None:
        key_scale = torch.stack(
            [scale[list(order.kv_order)] for scale, order in zip(key_scale, orders, strict=True)]
        )
    return PlanTensors(None, neuron_mean, head_mean, refit, key_scale)


def _baked_refit(
    weights: Refit, layer: LayerPlan, order: BakedLayer, shape: ModelShape
) -> dict[str, torch.Tensor]:
    """One layer's fitted weights, with rows and columns of its heads in the new order."""
    kept_kv = layer.kept_kv(shape)
    queries = _block_rows(
        [old for old in order.head_order if old in layer.attend_heads], layer.attend_heads
    )
    keys = _block_rows([old for old in order.kv_order if old in kept_kv], kept_kv)
    queries, keys = (
        (rows[:, None] * shape.head_dim + torch.arange(shape.head_dim)).flatten()
        for rows in (queries, keys)
    )
    moved = dict(weights)
    for name, rows in (("query", queries), ("key", keys), ("value", keys)):
        for each in (name, f"{name}_bias"):
            if each in moved:
                moved[each] = moved[each][rows]
    if "output" in moved:
        moved["output"] = moved["output"][:, queries]
    return moved


def _block_rows(moved: Sequence[int], ascending: Sequence[int]) -> torch.Tensor:
    """The old position of each head of the new order."""
    return torch.tensor([ascending.index(old) for old in moved], dtype=torch.int64)
