"""Generated scenes of colored shapes, and questions whose answers are known.

The demo model learns from these, and calibration, evaluation and the tests measure on them, so
nothing has to be downloaded and every answer is right by construction. A scene is two to five
objects on a 3 x 3 grid; an answer needs the object, its color and its place to be bound together.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from yopo.demo.questions import ANSWERS, KINDS, candidates
from yopo.demo.task import DemoPair, Task, Turn, digest, split_of
from yopo.demo.vocabulary import COLORS, GRID, SHAPES

IMAGE_SIZE = 64
MIN_OBJECTS, MAX_OBJECTS = 2, 5

_JITTER = 2  # pixels that a center may be off its cell's center
_RADII = (6, 7, 8)  # with the jitter, no object leaves its cell: objects never overlap
# Kinds of a conversation's turns: a model learns finding, then comparing objects last.
_TURN_KINDS = ("color", "shape", "count", "existence", *["position"] * 3, *["relation"] * 5)
_SHADE = 14  # how far each RGB channel may deviate from the named color


@dataclass(frozen=True)
class SceneObject:
    """One shape: its name, its cell (row, col) of the 3 x 3 grid, and how it is drawn."""

    color: str
    shape: str
    row: int
    col: int
    center: tuple[float, float]  # (row, col) in pixels
    radius: int
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a gray background; no two share both color and shape."""

    objects: tuple[SceneObject, ...]
    background: int

    def digest(self) -> str:
        """Return a stable hex digest of the objects and their cells, not of the drawing."""
        return digest(";".join(f"{o.color} {o.shape} {o.row} {o.col}" for o in self.objects))

    def split(self) -> str:
        """Return "heldout", "calibration" or "train": digest modulo 10 is 0, 1 or the rest."""
        return split_of(self.digest())

    def render(self) -> Image.Image:
        """Draw the scene as an RGB image of 64 x 64 pixels, without anti-aliasing."""
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (self.background,) * 3)
        draw = ImageDraw.Draw(image)
        for item in self.objects:
            _draw_shape(draw, item, item.rgb)
        return image

    def render_indices(self) -> Image.Image:
        """Draw a label image ("L"): 0 is background, 1 + i the pixels of object i."""
        image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
        draw = ImageDraw.Draw(image)
        for index, item in enumerate(self.objects):
            _draw_shape(draw, item, 1 + index)
        return image


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene from `rng`.

    Each scene uses a random subset of the colors and shapes: with a full palette, few scenes would
    have three red objects, and counts could be guessed.
    """
    colors = rng.sample(list(COLORS), rng.randint(1, len(COLORS)))
    shapes = rng.sample(SHAPES, rng.randint(1, len(SHAPES)))
    looks = list(itertools.product(colors, shapes))
    count = min(rng.randint(MIN_OBJECTS, MAX_OBJECTS), len(looks))
    if count < MIN_OBJECTS:
        return random_scene(rng)
    cells = sorted(rng.sample(range(GRID * GRID), count))
    looks = rng.sample(looks, count)
    objects = tuple(
        _place(color, shape, *divmod(cell, GRID), rng)
        for (color, shape), cell in zip(looks, cells, strict=True)
    )
    return Scene(objects, background=rng.randint(0, 50))


TASK = Task(
    stream="yopo",
    pictures="scenes",
    draw=random_scene,
    candidates=lambda scene, kind: candidates(scene.objects, kind),
    kinds=KINDS,
    answers=ANSWERS,
    turn_kinds=_TURN_KINDS,
    num_turns=12,
    long_kind="description",
    long_turns=4,
    long_share=0.15,
)


def split_scenes(split: str, *, seed: int = 0) -> Iterator[Scene]:
    """Yield scenes of one split without end."""
    return TASK.split_pictures(split, seed=seed)


def pairs(
    split: str, count: int, *, seed: int = 0, kinds: Sequence[str] | None = None
) -> Iterator[DemoPair]:
    """Yield pairs about scenes; "description" comes only when named. See `Task.pairs`."""
    return TASK.pairs(split, count, seed=seed, kinds=kinds)


def turns(split: str, *, seed: int = 0) -> Iterator[tuple[Scene, tuple[Turn, ...]]]:
    """Yield scenes with several questions each, without end. See `Task.turns`."""
    return TASK.turns(split, seed=seed)


def _place(color: str, shape: str, row: int, col: int, rng: random.Random) -> SceneObject:
    cell = IMAGE_SIZE / GRID
    center = (
        (row + 0.5) * cell + rng.randint(-_JITTER, _JITTER),
        (col + 0.5) * cell + rng.randint(-_JITTER, _JITTER),
    )
    red, green, blue = (
        min(255, max(0, channel + rng.randint(-_SHADE, _SHADE))) for channel in COLORS[color]
    )
    return SceneObject(color, shape, row, col, center, rng.choice(_RADII), (red, green, blue))


def _draw_shape(
    draw: ImageDraw.ImageDraw, item: SceneObject, fill: int | tuple[int, int, int]
) -> None:
    """Fill one shape; Pillow counts (col, row), we count (row, col)."""
    row, col = (round(value) for value in item.center)
    size = item.radius
    box = (col - size, row - size, col + size, row + size)
    if item.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif item.shape == "square":
        draw.rectangle((box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1), fill=fill)
    elif item.shape == "triangle":
        draw.polygon([(col, row - size), (box[0], box[3]), (box[2], box[3])], fill=fill)
    else:  # cross
        arm = size // 3
        draw.rectangle((col - arm, box[1], col + arm, box[3]), fill=fill)
        draw.rectangle((box[0], row - arm, box[2], row + arm), fill=fill)
