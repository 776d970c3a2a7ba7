"""The known reductions. A new one is a line here and a file; torch is not loaded.

DyMU is absent because it merges inside the vision tower, which would have to be rebuilt for every
tower; TopV because it works between decoder layers and no code of it can be checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pkgutil import resolve_name
from typing import Any

from yopo.reduction.method import Method
from yopo.support.errors import PlanError, suggest

METHODS: dict[str, str] = {
    "par": "yopo.reduction.methods.par:PAR",
    "divprune": "yopo.reduction.methods.divprune:DivPrune",
    "cdpruner": "yopo.reduction.methods.cdpruner:CDPruner",
    "scope": "yopo.reduction.methods.scope:Scope",
    "prumerge": "yopo.reduction.methods.prumerge:PruMerge",
    "prumerge+": "yopo.reduction.methods.prumerge:PruMergePlus",
    "folder": "yopo.reduction.methods.folder:Folder",
    "random": "yopo.reduction.methods.random:RandomChoice",
    "grid": "yopo.reduction.methods.grid:RegularGrid",
}
"""Name -> location of its class, in the order of tables."""


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        PlanError: No such method; suggests the closest names.
    """
    if name not in METHODS:
        raise PlanError(f"Unknown reduction '{name}'.", remedy=suggest(name, METHODS))
    return resolve_name(METHODS[name])


def make_method(name: str, keep: float, **parameters: Any) -> Method:
    """A method with parameters.

    Example:
        >>> make_method("par", 0.5).describe()
        'PAR (re-implemented from its description) at 50 % of the tokens'

    Raises:
        PlanError: No such method or parameter, or a value out of range.
    """
    kind = method_class(name)
    known = [each.name for each in fields(kind)]
    for each in parameters:
        if each not in known:
            raise PlanError(f"{name} has no parameter '{each}'.", remedy=suggest(each, known))
    made = kind(keep, **parameters)
    problem = made.problem()
    if problem is not None:
        raise PlanError(f"reduction: {problem[0]} {problem[1]}.")
    return made


def read_method(values: Mapping[str, Any]) -> Method:
    """A method from the plain values of a file, as ``Method.to_dict`` gives them.

    Raises:
        PlanError: As for ``make_method``, or a value of another type.
    """
    named = dict(values)
    name = named.pop("method", None)
    if not isinstance(name, str):
        raise PlanError("A reduction needs a 'method'.", remedy=f"One of {', '.join(METHODS)}.")
    kinds = {each.name: str(each.type) for each in fields(method_class(name))}
    for key, value in named.items():
        if not _is_of(kinds.get(key), value):
            raise PlanError(f"{name}: {key} is a {kinds[key]}, found {value!r}.")
    if "keep" not in named:
        raise PlanError(f"{name} needs the share of tokens to 'keep'.")
    lists = {key: tuple(each) for key, each in named.items() if isinstance(each, list)}
    return make_method(name, **named | lists)


def _is_of(kind: str | None, value: object) -> bool:
    """Whether a value has a field's type; names that are no field are refused elsewhere."""
    if kind is None:
        return True
    if kind.startswith("tuple"):
        return isinstance(value, list) and all(type(each) is int for each in value)
    known: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float)}
    return type(value) in known[kind]


def parse_method(text: str) -> Method:
    """A method as on command lines, ``NAME:SHARE[,PARAMETER=VALUE...]``.

    Example:
        >>> parse_method("par:0.5,merge=false").keep
        0.5

    Raises:
        PlanError: The text has another form, or names no method.
    """
    name, colon, rest = text.partition(":")
    share, *pairs = rest.split(",")
    try:
        keep = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        method_class(name)
        found = f"'{text}'" if colon else f"'{text}' without a share"
        raise PlanError(
            f"A reduction is NAME:SHARE, found {found}.", remedy="Write, for example, par:0.5."
        ) from None
    return make_method(name, keep, **dict(_parameter(name, each) for each in pairs))


SHARES = (1.0, 0.75, 0.5, 0.25)
"""Shares of the tokens that are compared where none is given; 1: no reduction."""

AUTO = "auto"


def parse_choice(text: str) -> tuple[Method, tuple[float, ...]]:
    """A method as on command lines, and the shares to choose from.

    The share may be left out, or be ``auto``: then the best of ``SHARES`` is chosen.

    Example:
        >>> parse_choice("par:0.5")[1], parse_choice("par")[1]
        ((), (1.0, 0.75, 0.5, 0.25))

    Raises:
        PlanError: As for ``parse_method``.
    """
    name, colon, rest = text.partition(":")
    share, comma, parameters = rest.partition(",")
    if (colon and share != AUTO) or name not in METHODS:
        return parse_method(text), ()
    return parse_method(f"{name}:1{comma}{parameters}"), SHARES


def _parameter(method: str, text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    kinds = {each.name: each.type for each in fields(method_class(method))}
    if key not in kinds or key == "keep":
        raise PlanError(f"{method} has no parameter '{key}'.", remedy=suggest(key, kinds))
    readers: dict[str, Callable[[str], Any]] = {"bool": _boolean, "int": int, "float": float}
    read = readers.get(str(kinds[key]))
    try:
        if read is None:
            raise ValueError
        return key, read(value)
    except ValueError:
        raise PlanError(f"{method}: {key} is a {kinds[key]}, found '{value}'.") from None


def _boolean(text: str) -> bool:
    values: Mapping[str, bool] = {"true": True, "false": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]
