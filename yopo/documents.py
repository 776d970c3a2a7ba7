"""Strict YAML documents: unknown keys, wrong types and duplicates are errors that name the line.

Plans and configurations are edited by hand, so a typo must be a sentence, not a silent default.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from yopo.errors import PlanError, suggest

Key = str | int

MAX_DEPTH = 100
"""Collections inside one another: libyaml's loader would overflow the stack on very many."""

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Document:
    """A parsed YAML mapping that remembers the line of every key.

    Attributes:
        name: What messages call it: the path, or ``<stdin>``.
        data: The content as plain Python values.
    """

    def __init__(self, name: str, text: str):
        self.name = name
        self._lines: dict[tuple[Key, ...], int] = {}
        try:
            _check_depth(text)
            loader = _Loader(text)
            root = loader.get_single_node()
            if root is not None:
                self._index(root, ())  # first: constructing merges keys
            self.data = None if root is None else loader.construct_document(root)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise PlanError(f"{name}: not valid YAML: {problem}") from error
        except RecursionError as error:
            raise PlanError(f"{name}: nests too deeply, or an alias contains itself.") from error
        if not isinstance(self.data, dict):
            found = "nothing" if self.data is None else type(self.data).__name__
            raise PlanError(f"{name}: expected a YAML mapping, found {found}.")

    def _index(self, node: yaml.Node, path: tuple[Key, ...]) -> None:
        self._lines[path] = node.start_mark.line + 1
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
            problem: What is wrong, continuing the sentence after the key.
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
        """Return ``value`` if it is a mapping without unknown keys, raise otherwise."""
        if not isinstance(value, dict):
            raise self.error(path, f"must be a mapping, found {describe(value)}")
        for key in value:
            if key not in known:
                raise self.error(
                    (*path, key), "is not a known key", remedy=suggest(str(key), known)
                )
        return value

    def typed(self, path: tuple[Key, ...], value: Any, kind: type | tuple[type, ...]) -> Any:
        """Return ``value`` if it is of ``kind`` (bool is no int, an int is a float), or raise."""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
            return value
        wanted = " or ".join(_NAMES.get(each, each.__name__) for each in kinds)
        raise self.error(path, f"must be {wanted}, found {describe(value)}")


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise RecursionError
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


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
    """How a message shows a wrong value: short, as YAML would write it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_text(source: str | Path) -> tuple[str, str]:
    """Read a text file, or stdin for ``-``.

    Returns:
        (name for messages, content).

    Raises:
        PlanError: The file is missing, a directory, unreadable or not UTF-8.
    """
    if str(source) == "-":
        try:
            return "<stdin>", sys.stdin.read()
        except UnicodeDecodeError as error:
            raise PlanError("<stdin>: is not UTF-8 text.") from error
    path = Path(source)
    try:
        return str(path), path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PlanError(f"{path}: no such file.") from error
    except IsADirectoryError as error:
        raise PlanError(f"{path}: is a directory, expected a file.") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: is not UTF-8 text.") from error
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}.") from error


def dump(data: Mapping[str, Any]) -> str:
    """Write a mapping as YAML: keys in their given order, leaf collections on one line."""
    return yaml.safe_dump(
        dict(data), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )
