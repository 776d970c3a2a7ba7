"""Damage of all kinds: to bytes, to text, and to structure that remains well-formed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 65_536, 2**31, 2**63, 10**30, -(2**70), 0.5, -0.0, 1e300,
    float("nan"), float("inf"), "", "all", "none", "x", "0", "\x1b[31m", "a\nb", "../x",
    "/etc/passwd", "~nobody/x", "\x00", "\ud800", "[red]", "é" * 300, "9" * 5000, "x" * 100_000,
    [], [[]], [None], [0], [1, 0], [0, 0], [True], ["x"], [1.5], [{}], {}, {"a": 1}, {"": None},
    {"text": "x"}, {"bytes": 10**12}, {"bytes": None, "path": None}, {"path": 3}, {"url": "x"},
)  # fmt: skip

WORDS = (
    b"&a ", b"*a", b"<<: ", b"!!int ", b"!!binary ", b"!x ", b"? ", b"- ", b": ", b"{", b"}", b"[",
    b"]", b"\x00", b"\xff", b"\xc2\x9b", b"\x1b[2J", b"\n", b"\r", b"\t", b"---\n", b"...\n", b"#",
    b'"', b"'", b"|", b">", b"%YAML 9\n", b".inf", b".nan", b"0b", b"0x", b"1:2:3", b"2026-99-99",
    b"9" * 5000, b"1e999", b"=", b"~", b"null", b"\xe2\x80\xae", b"[" * 2000, b"{a: " * 200,
    b"\\ud800", b"\\u0000", b"NaN", b"Infinity", b"-", b",",
)  # fmt: skip


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or insert in a few places."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(data) + 1)
        stop = min(len(data), place + rng.choice([1, 2, 8, 40, 400]))
        kind = rng.randrange(5)
        if kind == 0 and place < len(data):
            data[place] = rng.randrange(256)
        elif kind == 1:
            del data[place:stop]
        elif kind == 2:
            data[place:place] = data[place:stop]
        elif kind == 3:
            data[place:place] = rng.choice(WORDS)
        else:
            data[place:stop] = rng.choice(WORDS)
    return bytes(data)


def of_structure(document: Any, rng: random.Random) -> Any:
    """A copy of nested mappings and lists in which a few nodes are replaced, moved or gone."""
    changed = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(_places(changed))
        if not places:
            return rng.choice(STRANGE)
        holder, key = rng.choice(places)
        _change(holder, key, rng, lambda places=places: _value(*rng.choice(places)))
    return changed


def _value(holder: Any, key: Any) -> Any:
    return copy.deepcopy(holder[key])


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    keys = node if isinstance(node, dict) else range(len(node) if isinstance(node, list) else 0)
    for key in list(keys):
        yield node, key
        yield from _places(node[key])


def _change(holder: Any, key: Any, rng: random.Random, elsewhere: Callable[[], Any]) -> None:
    kind = rng.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = elsewhere()
    elif kind == 2:
        holder[key] = [holder[key]] * rng.choice([0, 1, 2, 50])
    elif kind == 3 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice([-1, 2, 1000, 10**9]) + rng.choice([-1, 0, 1])
    elif kind == 4 and isinstance(holder, dict):
        holder[rng.choice(["x", "", "bytes", "video", "neurons", key])] = holder.pop(key)
    elif kind == 5 and isinstance(holder, list):
        holder.insert(key, elsewhere())
    else:
        holder[key] = copy.deepcopy(rng.choice(STRANGE))
