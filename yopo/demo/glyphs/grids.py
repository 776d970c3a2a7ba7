"""Generated grids of glyphs: glyphs, colors, and how they are drawn.

A grid is 6 x 6 cells of 16 pixels, each empty or with one glyph; a visual token sees 12 x 12
pixels, so most glyphs span several tokens and are told apart by a few pixels. The paper gets redder
from row to row and bluer from column to column: Qwen2-VL's tower only knows relative positions of
patches, and could not tell the rows of a uniform page apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from yopo.demo.glyphs.font import BITMAPS, GLYPH_COLS, GLYPH_ROWS, GLYPHS
from yopo.demo.glyphs.questions import ANSWERS, COLORS, GRID, KINDS, Cell, candidates
from yopo.demo.task import DemoPair, Task, digest, split_of

CELL_SIZE = 16
IMAGE_SIZE = GRID * CELL_SIZE

_SCALE = 2  # a pixel of the font is 2 x 2 pixels of the image
_MARGINS = (CELL_SIZE - _SCALE * GLYPH_ROWS, CELL_SIZE - _SCALE * GLYPH_COLS)  # rows, columns
_SLOPE = 0.8  # how fast the paper gets redder and bluer, in levels of 255 per pixel
_SHADE = 14  # how far each RGB channel may deviate from the named color
_BLANKS = (0.0, 0.1, 0.3, 0.5)
# Kinds of a conversation's turns: a model learns counting last.
_TURN_KINDS = ("glyph", "color", "row", "column", "colors", *["existence"] * 2, *["count"] * 4)


@dataclass(frozen=True)
class Look:
    """How a grid is drawn; none of it changes an answer.

    Attributes:
        offsets: Per cell, in reading order: (row, col) pixels from the cell's corner to the glyph.
        inks: Per cell: RGB.
        green: The paper's green level.
        noise: How far each level may deviate, drawn per pixel.
        noise_seed: Seed of the noise.
    """

    offsets: tuple[tuple[int, int], ...]
    inks: tuple[tuple[int, int, int], ...]
    green: int
    noise: int = 0
    noise_seed: int = 0


@dataclass(frozen=True)
class GlyphGrid:
    """Cells in reading order, None where empty, and their look."""

    cells: tuple[Cell | None, ...]
    look: Look

    def digest(self) -> str:
        """Return a stable hex digest of the cells, not of their look."""
        return digest(";".join(f"{c.color} {c.glyph}" if c else "-" for c in self.cells))

    def split(self) -> str:
        """Return "heldout", "calibration" or "train", from the digest."""
        return split_of(self.digest())

    def pixels(self) -> np.ndarray:
        """Draw the grid: (96, 96, 3) uint8."""
        levels = _SLOPE * np.arange(IMAGE_SIZE)
        image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3))
        image[..., 0], image[..., 1], image[..., 2] = levels[:, None], self.look.green, levels
        for index, cell in enumerate(self.cells):
            if cell is None:
                continue
            corner = (CELL_SIZE * part for part in divmod(index, GRID))
            row, col = (a + b for a, b in zip(corner, self.look.offsets[index], strict=True))
            ink = BITMAPS[cell.glyph].repeat(_SCALE, 0).repeat(_SCALE, 1)
            image[row : row + len(ink), col : col + len(ink[0])][ink] = self.look.inks[index]
        if self.look.noise:
            noise = np.random.default_rng(self.look.noise_seed).random(image.shape)
            image += (2 * noise - 1) * self.look.noise
        return image.round().clip(0, 255).astype(np.uint8)

    def render(self) -> Image.Image:
        """Draw the grid as an RGB image of 96 x 96 pixels."""
        return Image.fromarray(self.pixels())


def random_grid(rng: random.Random, *, blanks: Sequence[float] = _BLANKS) -> GlyphGrid:
    """Draw a grid from `rng`.

    Each grid uses a random subset of the glyphs and colors: some have a single color, some only
    three glyphs.

    Args:
        rng: source of all randomness.
        blanks: probabilities of an empty cell; one is drawn for the grid.
    """
    glyphs = rng.sample(GLYPHS, rng.randint(3, len(GLYPHS)))
    colors = rng.sample(list(COLORS), rng.randint(1, len(COLORS)))
    blank = rng.choice(blanks)
    cells = tuple(
        None if rng.random() < blank else Cell(rng.choice(glyphs), rng.choice(colors))
        for _ in range(GRID * GRID)
    )
    rows, cols = _MARGINS
    look = Look(
        offsets=tuple((rng.randint(0, rows), rng.randint(1, cols - 1)) for _ in cells),
        inks=tuple(_ink(cell, rng) for cell in cells),
        green=rng.randint(0, 40),
    )
    return GlyphGrid(cells, look)


def shifted_grid(rng: random.Random) -> GlyphGrid:
    """Draw a grid unlike all training grids: mostly empty, in dim ink, on noisy paper."""
    grid = random_grid(rng, blanks=(0.7, 0.85))
    inks = tuple((int(0.8 * r), int(0.8 * g), int(0.8 * b)) for r, g, b in grid.look.inks)
    look = replace(grid.look, inks=inks, noise=12, noise_seed=rng.getrandbits(32))
    return replace(grid, look=look)


def _ink(cell: Cell | None, rng: random.Random) -> tuple[int, int, int]:
    """Draw a shade of the cell's color; an empty cell also advances `rng`."""
    shade = [rng.randint(-_SHADE, _SHADE) for _ in range(3)]
    named = COLORS[cell.color] if cell else (0, 0, 0)
    red, green, blue = (
        min(255, max(0, level + offset)) for level, offset in zip(named, shade, strict=True)
    )
    return red, green, blue


TASK = Task(
    stream="yopo glyphs",
    pictures="grids",
    draw=random_grid,
    candidates=lambda grid, kind: candidates(grid.cells, kind),
    kinds=KINDS,
    answers=ANSWERS,
    turn_kinds=_TURN_KINDS,
    num_turns=11,
    long_kind="grid",
    long_turns=6,
    long_share=0.2,
)
SHIFTED = replace(TASK, stream="yopo shifted glyphs", draw=shifted_grid)


def pairs(
    split: str, count: int, *, seed: int = 0, kinds: Sequence[str] | None = None
) -> Iterator[DemoPair]:
    """Yield pairs about glyph grids; see `yopo.demo.task.Task.pairs`."""
    return TASK.pairs(split, count, seed=seed, kinds=kinds)
