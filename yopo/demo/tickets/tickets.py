"""Generated tickets: lines of symbols on colored paper, somewhere in a picture of some size.

A picture is drawn on a canvas of one to four tiles of 48 x 48 pixels and then scaled, by another
factor each time and not quite the same both ways, so images have many sizes and aspect ratios;
InternVL's processor scales them back to the tiles whose aspect ratio is closest. A symbol takes
12 x 16 pixels of the canvas, a visual token sees 12 x 12, and no symbol lies across two tiles. The
paper gets redder from line to line and bluer from symbol to symbol: InternVL sees each tile by
itself, and could not tell which line of the ticket goes on in another tile.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from yopo.demo.glyphs.font import BITMAPS, GLYPH_COLS, GLYPH_ROWS, GLYPHS
from yopo.demo.task import DemoPair, Task, digest, split_of
from yopo.demo.tickets.questions import ANSWERS, KINDS, MAX_LINES, candidates

TILE_SIZE = 48
SYMBOL_ROWS, SYMBOL_COLS = 16, 12
"""Pixels of the canvas that a symbol takes; a tile holds three lines of four symbols."""
MIN_LINES = 2
MIN_LENGTH, MAX_LENGTH = 3, 8

Shape = tuple[int, int]
SMALL_SHAPES: tuple[Shape, ...] = ((1, 1),)
LARGE_SHAPES: tuple[Shape, ...] = ((1, 3), (3, 1), (2, 2))
SHAPES = (*SMALL_SHAPES, (1, 2), (2, 1), *LARGE_SHAPES)
"""(rows, columns) of tiles that pictures have."""

_SCALE = 2  # a pixel of the font is 2 x 2 pixels of the canvas
_MARGINS = (SYMBOL_ROWS - _SCALE * GLYPH_ROWS, SYMBOL_COLS - _SCALE * GLYPH_COLS)
_SLOPE = 1.6  # how fast the paper gets redder and bluer, in levels of 255 per pixel
_SIZES = (0.9, 1.25)  # smallest and largest factor that a canvas is scaled by
_STRETCH = 0.06  # how much the factors of height and width may differ from one another
_TURN_KINDS = ("first", "last", "lines", *["line"] * 3)


@dataclass(frozen=True)
class Look:
    """How a ticket is drawn; none of it changes an answer.

    Attributes:
        shape: (rows, columns) of tiles of the canvas.
        corner: Where on the canvas the ticket begins: lines from the top, symbols from the left.
        offsets: Per symbol, in reading order: (row, col) pixels from its corner to its ink.
        ink: RGB.
        green: The paper's green level.
        table: The level of gray around the ticket.
        size: (height, width) of the picture, in pixels.
    """

    shape: Shape
    corner: tuple[int, int]
    offsets: tuple[tuple[int, int], ...]
    ink: tuple[int, int, int]
    green: int
    table: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Ticket:
    """Lines of symbols, one string per line, and their look."""

    lines: tuple[str, ...]
    look: Look

    def digest(self) -> str:
        """Return a stable hex digest of what is written; the look does not enter."""
        return digest(";".join(self.lines))

    def split(self) -> str:
        """Return "heldout", "calibration" or "train", from the digest."""
        return split_of(self.digest())

    def canvas(self) -> np.ndarray:
        """Draw the ticket before it is scaled: (48 * rows, 48 * columns, 3) uint8."""
        rows, cols = self.look.shape
        image = np.full((TILE_SIZE * rows, TILE_SIZE * cols, 3), self.look.table, np.uint8)
        top, left = self.look.corner[0] * SYMBOL_ROWS, self.look.corner[1] * SYMBOL_COLS
        height, width = len(self.lines) * SYMBOL_ROWS, max(map(len, self.lines)) * SYMBOL_COLS
        paper = image[top : top + height, left : left + width]
        paper[..., 0] = (_SLOPE * np.arange(height))[:, None]
        paper[..., 1] = self.look.green
        paper[..., 2] = _SLOPE * np.arange(width)
        places = [
            (row, col, symbol)
            for row, line in enumerate(self.lines)
            for col, symbol in enumerate(line)
        ]
        for (row, col, symbol), (down, right) in zip(places, self.look.offsets, strict=True):
            ink = BITMAPS[symbol].repeat(_SCALE, 0).repeat(_SCALE, 1)
            y, x = row * SYMBOL_ROWS + down, col * SYMBOL_COLS + right
            paper[y : y + len(ink), x : x + len(ink[0])][ink] = self.look.ink
        return image

    def render(self) -> Image.Image:
        """Draw the ticket as an RGB image of its look's size."""
        height, width = self.look.size
        return Image.fromarray(self.canvas()).resize((width, height), Image.Resampling.BICUBIC)


def random_ticket(rng: random.Random, *, shapes: Sequence[Shape] = SHAPES) -> Ticket:
    """Draw a ticket from `rng`.

    Args:
        rng: where everything is drawn from.
        shapes: (rows, columns) of tiles, one of which the picture gets.
    """
    # The more tiles a shape has, the more there is to see, and the more often it is drawn.
    (shape,) = rng.choices(shapes, [rows * cols for rows, cols in shapes])
    rows, cols = shape
    room_lines = rows * TILE_SIZE // SYMBOL_ROWS
    width = cols * TILE_SIZE // SYMBOL_COLS
    num_lines = rng.randint(MIN_LINES, min(MAX_LINES, room_lines))
    # Lines end where they like, but half of the tickets use the room that there is.
    room_symbols = min(MAX_LENGTH, width)
    longest = rng.choice((room_symbols, rng.randint(MIN_LENGTH, room_symbols)))
    shortest = max(MIN_LENGTH, longest - 3)
    lengths = [rng.randint(shortest, longest) for _ in range(num_lines)]
    lines = tuple("".join(rng.choice(GLYPHS) for _ in range(length)) for length in lengths)
    corner = (rng.randint(0, room_lines - num_lines), rng.randint(0, width - max(lengths)))
    look = Look(
        shape=shape,
        corner=corner,
        offsets=tuple(
            (rng.randint(0, _MARGINS[0]), rng.randint(0, _MARGINS[1])) for _ in range(sum(lengths))
        ),
        ink=(rng.randint(60, 255), rng.randint(205, 255), rng.randint(60, 255)),
        green=rng.randint(0, 40),
        table=rng.randint(60, 110),
        size=_size(shape, rng),
    )
    return Ticket(lines, look)


def _size(shape: Shape, rng: random.Random) -> tuple[int, int]:
    """Draw the picture's (height, width); the canvas stays the closest of all in aspect ratio."""
    factor, stretch = rng.uniform(*_SIZES), 1 + rng.uniform(-_STRETCH, _STRETCH)
    height, width = (TILE_SIZE * tiles * factor for tiles in shape)
    return round(height * stretch), round(width)


TASK = Task(
    stream="yopo tickets",
    pictures="tickets",
    draw=random_ticket,
    candidates=lambda ticket, kind: candidates(ticket.lines, kind),
    kinds=KINDS,
    answers=ANSWERS,
    turn_kinds=_TURN_KINDS,
    num_turns=11,
    long_kind="all",
    long_turns=5,
    long_share=0.3,
)
SMALL = replace(
    TASK,
    stream="yopo small tickets",
    draw=lambda rng: random_ticket(rng, shapes=SMALL_SHAPES),
    answers={**ANSWERS, "lines": ("two", "three")},
)
"""Tickets in pictures of one tile."""
LARGE = replace(
    TASK, stream="yopo large tickets", draw=lambda rng: random_ticket(rng, shapes=LARGE_SHAPES)
)
"""Tickets in pictures of three or four tiles, with a thumbnail."""


def pairs(
    split: str, count: int, *, seed: int = 0, kinds: Sequence[str] | None = None
) -> Iterator[DemoPair]:
    """Yield pairs about tickets; "all" comes only when named. See `yopo.demo.task.Task.pairs`."""
    return TASK.pairs(split, count, seed=seed, kinds=kinds)
