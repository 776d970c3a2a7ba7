"""Writing and reading the layers of plan.yaml, under current and former keys."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from yopo.plans.layer_plan import LEVERS, LayerPlan, ModelShape, full_layer
from yopo.support.documents import Document, Key, describe

_LAYER_KEYS = tuple(each.name for each in fields(LayerPlan))
_FORMER_KEYS = {
    "heads": "read_heads",
    "attend": "attend_heads",
    "rank": "qkv_rank",
    "linear": "map_rank",
}
"""Layer keys in plans written before yopo 0.2 -> current keys."""


def layer_to_dict(layer: LayerPlan, shape: ModelShape) -> dict[str, Any]:
    """A layer as plain values: ``all`` or ``none`` for heads where possible, levers if used."""
    heads: Any = list(layer.read_heads)
    if not heads:
        heads = "none"
    elif len(heads) == shape.heads:
        heads = "all"
    attend: Any = bool(layer.attend_heads)
    if attend and layer.attend_heads != layer.read_heads:
        attend = list(layer.attend_heads)
    data = {
        "read_heads": heads,
        "attend_heads": attend,
        "radius": layer.radius,
        "neurons": layer.neurons,
    }
    used = {each.topic for each in LEVERS if getattr(layer, each.name) != each.default}
    return data | {each.name: getattr(layer, each.name) for each in LEVERS if each.topic in used}


def read_layers(document: Document, shape: ModelShape) -> tuple[LayerPlan, ...]:
    """The layers of a plan's document; ``shape`` must have been checked."""
    entries = document.typed(("layers",), document.data["layers"], list)
    return tuple(_read_layer(document, index, shape) for index in range(len(entries)))


def _read_layer(document: Document, index: int, shape: ModelShape) -> LayerPlan:
    path: tuple[Key, ...] = ("layers", index)
    known = (*_LAYER_KEYS, *_FORMER_KEYS)
    data = document.check_keys(path, document.data["layers"][index], known)
    for former, key in _FORMER_KEYS.items():
        if former in data and key in data:
            raise document.error(
                (*path, former), f"is the former name of {key}, which is also given"
            )
    spelled = {_FORMER_KEYS.get(key, key): key for key in data}

    def read(name: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        key = spelled.get(name, name)
        if default and key not in data:
            return default[0]
        return document.required(path, data, key, kind)

    def place(name: str) -> tuple[Key, ...]:
        return (*path, spelled.get(name, name))

    heads = read("read_heads", (str, list))
    heads = _read_heads(document, place("read_heads"), heads, shape)
    attend = read("attend_heads", (bool, list))
    if isinstance(attend, list):
        attend = _read_heads(document, place("attend_heads"), attend, shape)
    elif isinstance(attend, bool):
        attend = heads if attend else ()
    radius = read("radius", (int, type(None)), None)
    levers = {
        each.name: read(
            each.name, int if each.default is not None else (int, type(None)), each.default
        )
        for each in LEVERS
    }
    return LayerPlan(heads, attend, radius, read("neurons", int), **levers)


def as_spelled(document: Document, path: tuple[Key, ...]) -> tuple[Key, ...]:
    """The path to a layer's key as the document spells it, possibly by its former name."""
    if path[:1] != ("layers",) or len(path) < 3:
        return path
    data = document.data["layers"][path[1]]
    former = next((old for old, new in _FORMER_KEYS.items() if new == path[2]), None)
    return path if former is None or former not in data else (*path[:2], former)


def _read_heads(
    document: Document, path: tuple[Key, ...], value: Any, shape: ModelShape
) -> tuple[int, ...]:
    if value == "all":
        return full_layer(shape).read_heads
    if value == "none":
        return ()
    if not isinstance(value, list):
        problem = f"must be 'all', 'none' or a list of heads, found {describe(value)}"
        raise document.error(path, problem)
    return tuple(document.typed((*path, index), head, int) for index, head in enumerate(value))
