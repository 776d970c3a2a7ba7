"""Every unambiguous question about a scene, with its answer.

One function per kind lists all of a scene's (question, answer) candidates; the caller picks one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from yopo.demo.vocabulary import (
    COLORS,
    GRID,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    place,
)

MIN_DESCRIBED = 4  # minimum objects for a description of 32 tokens or more


class Placed(Protocol):
    """An object as questions see it."""

    @property
    def color(self) -> str:
        """Name of its color."""

    @property
    def shape(self) -> str:
        """Name of its shape."""

    @property
    def row(self) -> int:
        """Row in the grid."""

    @property
    def col(self) -> int:
        """Column in the grid."""


Objects = Sequence[Placed]
Candidates = list[tuple[str, str]]


def candidates(objects: Objects, kind: str) -> Candidates:
    """List all (question, answer) of one kind that the scene allows; may be empty."""
    return _ASKERS[kind](objects)


def _color(objects: Objects) -> Candidates:
    shapes = Counter(o.shape for o in objects)
    by_shape = [(f"what color is the {o.shape}?", o.color) for o in objects if shapes[o.shape] == 1]
    by_place = [
        (f"what color is the object at the {place(o.row, o.col)}?", o.color) for o in objects
    ]
    return by_shape + by_place


def _shape(objects: Objects) -> Candidates:
    colors = Counter(o.color for o in objects)
    by_color = [
        (f"what shape is the {o.color} object?", o.shape) for o in objects if colors[o.color] == 1
    ]
    by_place = [
        (f"what shape is the object at the {place(o.row, o.col)}?", o.shape) for o in objects
    ]
    return by_color + by_place


def _count(objects: Objects) -> Candidates:
    colors = Counter(o.color for o in objects)
    shapes = Counter(o.shape for o in objects)
    names = {PLURALS[shape]: shapes[shape] for shape in SHAPES}
    names |= {f"{color} objects": colors[color] for color in COLORS}
    names["objects"] = len(objects)
    return [(f"how many {name} are there?", NUMBERS[count]) for name, count in names.items()]


def _existence(objects: Objects) -> Candidates:
    """Ask for a color and a shape; for a "no", both are in the scene, but not in one object.

    If every combination exists, a "no" has one of the two in the scene.
    """
    present = {(o.color, o.shape) for o in objects}
    colors = sorted({color for color, _ in present})
    shapes = sorted({shape for _, shape in present})
    absent = [look for look in itertools.product(colors, shapes) if look not in present]
    if not absent:
        absent = [(c, s) for c in COLORS for s in SHAPES if (c in colors) != (s in shapes)]
    yes = [(f"is there a {color} {shape}?", "yes") for color, shape in sorted(present)]
    return yes + [(f"is there a {color} {shape}?", "no") for color, shape in absent]


def _relation(objects: Objects) -> Candidates:
    """Compare rows or columns that differ; objects in one row are neither above nor below."""
    found = []
    for one, other in itertools.permutations(objects, 2):
        rightward, downward = other.col - one.col, other.row - one.row
        offsets = (rightward, -rightward, downward, -downward)
        for relation, offset in zip(RELATIONS, offsets, strict=True):
            if offset:
                question = (
                    f"is the {one.color} {one.shape} {relation} the {other.color} {other.shape}?"
                )
                found.append((question, "yes" if offset > 0 else "no"))
    return found


def _position(objects: Objects) -> Candidates:
    return [(f"where is the {o.color} {o.shape}?", place(o.row, o.col)) for o in objects]


def _description(objects: Objects) -> Candidates:
    """Name all objects in reading order; only where the answer gets long (32 to 40 tokens)."""
    if len(objects) < MIN_DESCRIBED:
        return []
    named = [f"a {o.color} {o.shape} at the {place(o.row, o.col)}" for o in objects]
    return [("describe the scene.", ", ".join(named) + ".")]


_ASKERS: dict[str, Callable[[Objects], Candidates]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "existence": _existence,
    "relation": _relation,
    "position": _position,
    "description": _description,
}
KINDS = tuple(_ASKERS)
SHORT_KINDS = KINDS[:-1]

# The answers a kind can have, each equally likely in `yopo.demo.scenes.pairs`.
ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "count": NUMBERS,
    "existence": ("yes", "no"),
    "relation": ("yes", "no"),
    "position": tuple(place(row, col) for row in range(GRID) for col in range(GRID)),
}
