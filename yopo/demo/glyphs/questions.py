"""Every unambiguous question about a grid of glyphs, with its answer.

One function per kind lists all of a grid's (question, answer) candidates; the caller picks one.
"""

from __future__ import annotations

from collections import Counter
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
MAX_COUNTED = 3  # more of a color in one row are too rare to be asked for


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


def _colors_by_row(cells: Cells) -> list[tuple[int, Counter[str]]]:
    """Per row: how many of its glyphs have each of the colors that the grid has."""
    present = sorted({cell.color for _, cell in _filled(cells)})
    rows = (cells[start : start + GRID] for start in range(0, GRID * GRID, GRID))
    counted = (Counter(cell.color for cell in row if cell) for row in rows)
    return [
        (row, Counter({color: counts[color] for color in present}))
        for row, counts in enumerate(counted)
    ]


def _position(cells: Cells) -> Candidates:
    """Ask for the one glyph of its color in a row."""
    counts = _colors_by_row(cells)
    return [
        (
            f"where is the {cell.color} one in row {ORDINALS[index // GRID]}?",
            f"column {ORDINALS[index % GRID]}",
        )
        for index, cell in _filled(cells)
        if counts[index // GRID][1][cell.color] == 1
    ]


def _existence(cells: Cells) -> Candidates:
    """Ask for a color that the grid has, in one row."""
    return [
        (f"is there a {color} one in row {ORDINALS[row]}?", "yes" if count else "no")
        for row, counts in _colors_by_row(cells)
        for color, count in counts.items()
    ]


def _count(cells: Cells) -> Candidates:
    """Ask for a color that the grid has, in one row; zero if the row has none."""
    return [
        (f"how many {color} are in row {ORDINALS[row]}?", NUMBERS[count])
        for row, counts in _colors_by_row(cells)
        for color, count in counts.items()
        if count <= MAX_COUNTED
    ]


def _read(name: str, index: int, cells: Cells) -> str:
    return " ".join([name, ORDINALS[index], *(cell.glyph if cell else EMPTY for cell in cells)])


def _read_row(cells: Cells, row: int) -> str:
    return _read("row", row, cells[row * GRID : (row + 1) * GRID])


def _row(cells: Cells) -> Candidates:
    return [(f"read row {ORDINALS[row]}.", f"{_read_row(cells, row)}.") for row in range(GRID)]


def _column(cells: Cells) -> Candidates:
    return [
        (f"read column {ORDINALS[col]}.", f"{_read('column', col, cells[col::GRID])}.")
        for col in range(GRID)
    ]


def _grid(cells: Cells) -> Candidates:
    """Read all rows: an answer of 54 tokens."""
    return [("read the grid.", ", ".join(_read_row(cells, row) for row in range(GRID)) + ".")]


_ASKERS: dict[str, Callable[[Cells], Candidates]] = {
    "glyph": _glyph,
    "color": _color,
    "position": _position,
    "existence": _existence,
    "count": _count,
    "row": _row,
    "column": _column,
    "grid": _grid,
}
KINDS = tuple(_ASKERS)

# The answers a kind can have, each equally likely in pairs; what is read has too many.
ANSWERS: dict[str, tuple[str, ...]] = {
    "glyph": GLYPHS,
    "color": tuple(COLORS),
    "position": tuple(f"column {ordinal}" for ordinal in ORDINALS),
    "existence": ("yes", "no"),
    "count": NUMBERS[: MAX_COUNTED + 1],
}
