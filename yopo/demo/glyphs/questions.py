"""Every unambiguous question about a grid of glyphs, with its answer.

One function per kind lists all of a grid's (question, answer) candidates; the caller picks one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yopo.demo.glyphs.font import GLYPHS, LOOKALIKES

GRID = 6
EMPTY = "-"
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (240, 60, 60),
    "green": (60, 210, 80),
    "blue": (80, 130, 250),
    "yellow": (240, 225, 60),
}
ORDINALS = ("one", "two", "three", "four", "five", "six")
NUMBERS = ("zero", *ORDINALS)
MAX_COUNTED = 3  # more of a glyph in one row are too rare to be asked for


@dataclass(frozen=True)
class Cell:
    """A glyph and its color."""

    glyph: str
    color: str


Cells = Sequence[Cell | None]
Candidates = list[tuple[str, str]]


def place(index: int) -> str:
    """Name a cell, e.g. "row two column five"; `index` counts in reading order."""
    row, col = divmod(index, GRID)
    return f"row {ORDINALS[row]} column {ORDINALS[col]}"


def candidates(cells: Cells, kind: str) -> Candidates:
    """List all (question, answer) of one kind that a grid allows; may be empty."""
    return _ASKERS[kind](cells)


def _filled(cells: Cells) -> list[tuple[int, Cell]]:
    return [(index, cell) for index, cell in enumerate(cells) if cell]


def _glyph(cells: Cells) -> Candidates:
    return [(f"what is at {place(index)}?", cell.glyph) for index, cell in _filled(cells)]


def _color(cells: Cells) -> Candidates:
    return [(f"what color is {place(index)}?", cell.color) for index, cell in _filled(cells)]


def _position(cells: Cells) -> Candidates:
    counts = Counter(cell.glyph for _, cell in _filled(cells))
    return [
        (f"where is the {cell.glyph}?", place(index))
        for index, cell in _filled(cells)
        if counts[cell.glyph] == 1
    ]


def _existence(cells: Cells) -> Candidates:
    """Ask for a glyph; for a "no", one of its lookalikes is there, where it has any."""
    present = {cell.glyph for _, cell in _filled(cells)}
    tempting = {
        glyph for group in LOOKALIKES if present & set(group) for glyph in group
    } - present or set(GLYPHS) - present
    asked = [(glyph, "yes") for glyph in sorted(present)]
    asked += [(glyph, "no") for glyph in sorted(tempting)]
    return [(f"is there a {glyph}?", answer) for glyph, answer in asked]


def _count(cells: Cells) -> Candidates:
    """Ask for a glyph that the grid has, in one row; zero if the row has none."""
    present = sorted({cell.glyph for _, cell in _filled(cells)})
    asked = []
    for row in range(GRID):
        counts = Counter(cell.glyph for cell in cells[row * GRID : (row + 1) * GRID] if cell)
        asked += [
            (f"how many {glyph} are in row {ORDINALS[row]}?", NUMBERS[counts[glyph]])
            for glyph in present
            if counts[glyph] <= MAX_COUNTED
        ]
    return asked


def _read(cells: Cells, row: int) -> str:
    glyphs = [cell.glyph if cell else EMPTY for cell in cells[row * GRID : (row + 1) * GRID]]
    return " ".join(["row", ORDINALS[row], *glyphs])


def _row(cells: Cells) -> Candidates:
    return [(f"read row {ORDINALS[row]}.", f"{_read(cells, row)}.") for row in range(GRID)]


def _grid(cells: Cells) -> Candidates:
    """Read all rows: an answer of 54 tokens."""
    return [("read the grid.", ", ".join(_read(cells, row) for row in range(GRID)) + ".")]


_ASKERS: dict[str, Callable[[Cells], Candidates]] = {
    "glyph": _glyph,
    "color": _color,
    "position": _position,
    "existence": _existence,
    "count": _count,
    "row": _row,
    "grid": _grid,
}
KINDS = tuple(_ASKERS)

# The answers a kind can have, each equally likely in pairs; rows and grids have too many.
ANSWERS: dict[str, tuple[str, ...]] = {
    "glyph": GLYPHS,
    "color": tuple(COLORS),
    "position": tuple(place(index) for index in range(GRID * GRID)),
    "existence": ("yes", "no"),
    "count": NUMBERS[: MAX_COUNTED + 1],
}
