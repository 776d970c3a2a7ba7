"""Strict YAML documents: unknown keys, wrong types and duplicates are errors that name the line.

Plans and configurations are edited by hand, so a typo must be an error, not a silent default.
They also come from untrusted sources, so anything that a few bytes could blow up (aliases, numbers,
depth) is bounded.
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from yaml.constructor import ConstructorError

from yopo.support.errors import PlanError, suggest
from yopo.support.reading import read_bytes

Key = str | int

MAX_DEPTH = 100
"""Maximum nesting of collections: libyaml's loader overflows the stack on very deep ones."""

MAX_BYTES = 8 << 20
"""Maximum document size; a plan of 128 layers of 128 heads takes a tenth of a megabyte."""

MAX_NODES = 250_000
"""Maximum number of keys, values and collections; aliases count every time they are used."""

MAX_DIGITS = 100
"""Maximum length of a number: conversion time is quadratic in the number of digits."""

_CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]")
"""Characters that a terminal may take as commands; line breaks and tabs are allowed."""

_DATE, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "int", "float"))


if TYPE_CHECKING:
    _SafeLoader = yaml.SafeLoader
else:  # libyaml's loader is many times faster, where it is available
    _SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """The safe loader, except that dates are text, and numbers must be short and finite."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Construct an int or a float."""
        try:
            if len(node.value) > MAX_DIGITS:
                raise ValueError(f"a number of {len(node.value)} characters")
            if node.tag == _INT:
                return self.construct_yaml_int(node)
            number = self.construct_yaml_float(node)
            if not math.isfinite(number):
                raise ValueError("a number that is not finite")
            return number
        except (ValueError, ArithmeticError) as error:  # such as 0b, which matches YAML's pattern
            raise ConstructorError(None, None, str(error), node.start_mark) from error


_Loader.add_constructor(_INT, _Loader.construct_number)
_Loader.add_constructor(_FLOAT, _Loader.construct_number)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """The safe dumper without anchors and aliases: repeated values are written out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class Document:
    """A parsed YAML mapping that remembers the line of every key.

    Attributes:
        name: Name in messages: the path, or ``<stdin>``.
        data: The content as plain Python values.
    """

    def __init__(self, name: str, text: str):
        self.name = name
        self._lines: dict[tuple[Key, ...], int] = {}
        self._num_nodes = 0
        try:
            _check_events(name, text)
            loader = _Loader(text)
            root = loader.get_single_node()
            if root is not None:
                self._index(root, ())  # first: constructing merges keys
            data = None if root is None else loader.construct_document(root)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise PlanError(f"{name}: not valid YAML: {problem}") from error
        except RecursionError as error:
            raise PlanError(f"{name}: nests too deeply, or an alias contains itself.") from error
        if not isinstance(data, dict):
            found = "nothing" if data is None else type(data).__name__
            raise PlanError(f"{name}: expected a YAML mapping, found {found}.")
        self.data: dict[str, Any] = data

    def _index(self, node: yaml.Node, path: tuple[Key, ...]) -> None:
        self._lines[path] = node.start_mark.line + 1
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise _too_many(self.name)
        if len(path) > MAX_DEPTH:
            raise RecursionError
        if isinstance(node, yaml.ScalarNode) and _CONTROLS.search(node.value):
            raise self.error(path, "holds a control character")
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                self._index(child, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue  # refused by the constructor
                here = (*path, key.value)
                if here in self._lines:
                    first = self._lines[here]
                    self._lines[here] = key.start_mark.line + 1
                    raise self.error(here, f"appears twice (first on line {first})")
                self._index(child, here)
                self._lines[here] = key.start_mark.line + 1

    def error(self, path: Iterable[Key], problem: str, *, remedy: str | None = None) -> PlanError:
        """Build (not raise) an error that names the line and the key: ``plan.yaml:12: layers[3]``.

        Args:
            path: Keys and indices from the root.
            problem: What is wrong, as the rest of a sentence that starts with the key.
            remedy: What to do about it.
        """
        keys = tuple(path)
        known = keys
        while known and known not in self._lines:
            known = known[:-1]
        label = ""
        for key in keys:
            label += f"[{key}]" if isinstance(key, int) else f".{key}" if label else str(key)
        where = f"{self.name}:{self._lines.get(known, 1)}"
        return PlanError(f"{where}: {label or 'document'} {problem}.", remedy=remedy)

    def check_keys(self, path: tuple[Key, ...], value: Any, known: Iterable[str]) -> dict[str, Any]:
        """Return ``value`` if it is a mapping without unknown keys; raise otherwise."""
        if not isinstance(value, dict):
            raise self.error(path, f"must be a mapping, found {describe(value)}")
        for key in value:
            if key not in known:
                raise self.error(
                    (*path, key), "is not a known key", remedy=suggest(str(key), known)
                )
        return value

    def required(
        self,
        path: tuple[Key, ...],
        data: dict[str, Any],
        key: str,
        kind: type | tuple[type, ...],
    ) -> Any:
        """Return ``data[key]``, checked to be of ``kind``; ``data`` is the mapping at ``path``."""
        if key not in data:
            raise self.error(path, f"lacks the key '{key}'")
        return self.typed((*path, key), data[key], kind)

    def typed(self, path: tuple[Key, ...], value: Any, kind: type | tuple[type, ...]) -> Any:
        """Return ``value`` if it is of ``kind`` (a bool is not an int, an int is a float)."""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
            return value
        expected = " or ".join(_NAMES.get(each, each.__name__) for each in kinds)
        raise self.error(path, f"must be {expected}, found {describe(value)}")


def _check_events(name: str, text: str) -> None:
    """Scan a document's events before anything is built from them."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if number > 2 * MAX_NODES:  # a collection has two
            raise _too_many(name)
        tag = getattr(event, "tag", None)
        if tag is not None:
            line = 1 if event.start_mark is None else event.start_mark.line + 1
            raise PlanError(f"{name}:{line}: not valid YAML here: tags are not allowed ({tag}).")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise RecursionError
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _too_many(name: str) -> PlanError:
    return PlanError(
        f"{name}: holds more than {MAX_NODES:,} values (aliases count every time they are used)."
    )


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def describe(value: Any) -> str:
    """A wrong value as messages show it: short, as YAML would write it."""
    text = "null" if value is None else _SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20
"""``repr`` with bounded output, whatever the value's size or depth."""


def read_text(source: str | Path) -> tuple[str, str]:
    """Read a text file, or stdin for ``-``.

    Returns:
        (name for messages, content).

    Raises:
        PlanError: The file is missing, not a regular file, too long, unreadable or not UTF-8.
    """
    if str(source) == "-":
        try:
            text = sys.stdin.read(MAX_BYTES + 1)
        except UnicodeDecodeError as error:
            raise PlanError("<stdin>: is not UTF-8 text.") from error
        if len(text) > MAX_BYTES:
            raise PlanError(f"<stdin>: is longer than the limit of {MAX_BYTES:,} characters.")
        return "<stdin>", text
    path = Path(source)
    try:
        return str(path), read_bytes(path, limit=MAX_BYTES, error=PlanError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: is not UTF-8 text.") from error


def dump(data: Mapping[str, Any]) -> str:
    """Write a mapping as YAML: keys in their given order, leaf collections on one line."""
    return yaml.dump(
        dict(data),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=100,
        allow_unicode=True,
    )
