"""Whether an inference engine can run a plan, and if not, why. No torch, no engine.

An engine's attention kernels hide no keys from single heads, so every head of every layer must be
able to read the visual keys. What visual tokens compute with their own rows is free: queries,
keys, values, output projection and FFN.
"""

from __future__ import annotations

from collections.abc import Iterable

from yopo.plans.schema import LEVERS, LayerPlan, ModelShape, PruningPlan

_RUN = ("qkv_rank", "map_rank")
"""Levers that the plugin runs."""


def engine_problem(plan: PruningPlan) -> str | None:
    """Why vLLM cannot run a plan, as the rest of a sentence; None if it can.

    Example:
        >>> engine_problem(plan)
        'in layer 3 no head reads visual tokens'
    """
    if plan.reduction is not None:
        return f"it reduces visual tokens ({plan.reduction.name}), and all of theirs have slots"
    if plan.bidirectional:
        return "visual tokens attend to later ones (bidirectional), which its kernels do not"
    return layers_problem(plan.layers, plan.model.shape)


def layers_problem(layers: Iterable[LayerPlan], shape: ModelShape) -> str | None:
    """The same for the layers of a plan."""
    for index, layer in enumerate(layers):
        problem = _layer_problem(layer, shape)
        if problem is not None:
            return f"in layer {index} {problem}"
    return None


def _layer_problem(layer: LayerPlan, shape: ModelShape) -> str | None:
    silent = shape.heads - len(layer.read_heads)
    if silent == shape.heads:
        return "no head reads visual tokens"
    if silent:
        return f"{silent} of {shape.heads} heads may not read visual tokens"
    if layer.attend_heads and layer.radius is not None:
        return f"visual tokens attend only to neighbors (radius {layer.radius})"
    if layer.is_quantised:
        return "visual keys or values are stored in few bits"
    for lever in LEVERS:  # those that the plugin does not know
        if lever.name not in _RUN and getattr(layer, lever.name) != lever.default:
            return f"it cannot do what {lever.name} says ({lever.title})"
    return None
