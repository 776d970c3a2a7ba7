"""Checks a plan's tensors before it is run, written or baked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from yopo.plans.schema import PruningPlan
from yopo.plans.tensors import PlanTensors, refit_sizes
from yopo.support.errors import PlanError
from yopo.support.finite import is_finite


def check_tensors(plan: PruningPlan, where: str = "The plan") -> None:
    """Check that a plan holds all tensors that it needs, with its model's shape.

    Args:
        plan: The plan.
        where: Name in messages: the file's path, or a phrase for a plan in memory.

    Raises:
        PlanError: One is missing, misshapen or not finite, or an order is not a permutation.
    """
    shape, tensors = plan.model.shape, plan.tensors
    expected = {
        "neuron_order": (shape.layers, shape.ffn),
        "neuron_mean": (shape.layers, shape.ffn),
        "head_mean": (shape.layers, shape.heads, shape.head_dim),
        "key_scale": (shape.layers, shape.kv_heads, shape.head_dim),
    }
    for name, size in expected.items():
        tensor = getattr(tensors, name)
        if tensor is not None and tuple(tensor.shape) != size:
            raise PlanError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {size}.")
    order = tensors.neuron_order
    if order is None and plan.needs_order and not plan.baked:
        raise PlanError(f"{where}: lacks neuron_order, which the plan needs.")
    if order is not None and not torch.equal(
        order.sort(dim=1).values, torch.arange(shape.ffn).expand_as(order)
    ):
        raise PlanError(f"{where}: neuron_order is not a permutation of the neurons.")
    if plan.compensation == "mean" and (tensors.neuron_mean is None or tensors.head_mean is None):
        raise PlanError(f"{where}: lacks the means that 'compensation: mean' needs.")
    if plan.needs_key_scale:
        _check_key_scale(plan, where)
    if plan.compensation == "refit":
        _check_refit(plan, where)
    for name, tensor in _floats(tensors):
        if not is_finite(tensor):
            raise PlanError(
                f"{where}: {name} holds values that are not finite.", remedy="Calibrate again."
            )


def _check_key_scale(plan: PruningPlan, where: str) -> None:
    scale = plan.tensors.key_scale
    if scale is None:
        raise PlanError(
            f"{where}: lacks key_scale, by which quantised keys are divided.",
            remedy="It is measured in calibration: calibrate again with --kv-budget.",
        )
    if not bool((scale > 0).all()):  # a NaN is not, either
        raise PlanError(f"{where}: key_scale must be positive.", remedy="Calibrate again.")


def _floats(tensors: PlanTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in messages, tensor) of all tensors other than the order."""
    for name in ("neuron_mean", "head_mean", "key_scale"):
        tensor = getattr(tensors, name)
        if tensor is not None:
            yield name, tensor
    for layer, weights in tensors.refit.items():
        for name, tensor in weights.items():
            yield f"layer {layer}'s fitted '{name}'", tensor


def _check_refit(plan: PruningPlan, where: str) -> None:
    for index, layer in enumerate(plan.layers[: plan.visual_depth]):
        weights = plan.tensors.refit.get(index, {})
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        expected = refit_sizes(layer, plan.model.shape)
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                raise PlanError(
                    f"{where}: layer {index}'s fitted '{name}' has shape {found.get(name)}, "
                    f"expected {expected.get(name)}.",
                    remedy="Fitted weights belong to one plan: calibrate again instead of editing.",
                )
