"""Our own pixel font: 24 glyphs of 5 x 7 pixels, many of them alike but for one or two pixels."""

from __future__ import annotations

import numpy as np

GLYPH_ROWS, GLYPH_COLS = 7, 5

_BITMAPS = """
0 .###. #...# #..## #.#.# ##..# #...# .###.
1 ..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.
2 .###. #...# ....# ...#. ..#.. .#... #####
3 .###. #...# ....# ..##. ....# #...# .###.
4 ...#. ..##. .#.#. #..#. ##### ...#. ...#.
5 ##### #.... ####. ....# ....# #...# .###.
6 .###. #.... #.... ####. #...# #...# .###.
7 ##### ....# ...#. ..#.. ..#.. ..#.. ..#..
8 .###. #...# #...# .###. #...# #...# .###.
9 .###. #...# #...# .#### ....# ....# .###.
B ####. #...# #...# ####. #...# #...# ####.
C .###. #...# #.... #.... #.... #...# .###.
D ####. #...# #...# #...# #...# #...# ####.
E ##### #.... #.... ####. #.... #.... #####
F ##### #.... #.... ####. #.... #.... #....
G .###. #...# #.... #.### #...# #...# .###.
I .###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.
O .###. #...# #...# #...# #...# #...# .###.
P ####. #...# #...# ####. #.... #.... #....
Q .###. #...# #...# #...# #.#.# #..#. .##.#
R ####. #...# #...# ####. #.#.. #..#. #...#
S .#### #.... #.... .###. ....# ....# ####.
T ##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..
Z ##### ....# ...#. ..#.. .#... #.... #####
"""


def _read(line: str) -> tuple[str, np.ndarray]:
    glyph, *rows = line.split()
    return glyph, np.array([[pixel == "#" for pixel in row] for row in rows])


BITMAPS: dict[str, np.ndarray] = dict(_read(line) for line in _BITMAPS.strip().splitlines())
"""Glyph -> (7, 5) bool, true where there is ink."""

GLYPHS = tuple(BITMAPS)

LOOKALIKES: tuple[str, ...] = ("0ODQCG", "8B369RP", "1I7T", "5S", "2Z", "EF")
"""Groups that are easily taken for one another; 4 is like none."""
