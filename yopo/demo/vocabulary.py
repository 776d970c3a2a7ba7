"""The words for describing demo scenes."""

from __future__ import annotations

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 180, 50),
    "blue": (40, 70, 230),
    "yellow": (235, 220, 30),
    "purple": (160, 40, 190),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
GRID = 3
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
RELATIONS = ("left of", "right of", "above", "below")


def place(row: int, col: int) -> str:
    """Name a cell of the grid, e.g. "top left"."""
    return f"{ROWS[row]} {COLUMNS[col]}"
