"""Every unambiguous question about a grid of glyphs, with its answer.

One function per kind lists all of a grid's (question, answer) candidates; the caller picks one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yopo.demo.glyphs.font import GLYPHS

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


def _existence(cells: Cells) -> Candidates:
    return [
        (f"is there one at {place(index)}?", "yes" if cell else "no")
        for index, cell in enumerate(cells)
    ]


def _count(cells: Cells) -> Candidates:
    """Ask how many of a row's cells are not empty."""
    return [
        (f"how many are in row {ORDINALS[row]}?", NUMBERS[sum(map(bool, _row_of(cells, row)))])
        for row in range(GRID)
    ]


def _row_of(cells: Cells, row: int) -> Cells:
    return cells[row * GRID : (row + 1) * GRID]


def _read(name: str, index: int, cells: Cells, part: str = "glyph") -> str:
    """Name a row or column and read the glyphs or colors of its cells."""
    parts = (getattr(cell, part) if cell else EMPTY for cell in cells)
    return " ".join([name, ORDINALS[index], *parts])


def _row(cells: Cells) -> Candidates:
    return [
        (f"read row {ORDINALS[row]}.", _read("row", row, _row_of(cells, row)) + ".")
        for row in range(GRID)
    ]


def _column(cells: Cells) -> Candidates:
    return [
        (f"read column {ORDINALS[col]}.", _read("column", col, cells[col::GRID]) + ".")
        for col in range(GRID)
    ]


def _colors(cells: Cells) -> Candidates:
    return [
        (
            f"what color is row {ORDINALS[row]}?",
            _read("row", row, _row_of(cells, row), "color") + ".",
        )
        for row in range(GRID)
    ]


def _grid(cells: Cells) -> Candidates:
    """Read all rows: an answer of 54 tokens."""
    rows = (_read("row", row, _row_of(cells, row)) for row in range(GRID))
    return [("read the grid.", ", ".join(rows) + ".")]


_ASKERS: dict[str, Callable[[Cells], Candidates]] = {
    "glyph": _glyph,
    "color": _color,
    "existence": _existence,
    "count": _count,
    "row": _row,
    "column": _column,
    "colors": _colors,
    "grid": _grid,
}
KINDS = tuple(_ASKERS)

# The answers a kind can have, each equally likely in pairs; reading has too many to list.
ANSWERS: dict[str, tuple[str, ...]] = {
    "glyph": GLYPHS,
    "color": tuple(COLORS),
    "existence": ("yes", "no"),
    "count": NUMBERS,
}
