"""Generated scenes of colored shapes, and questions whose answers are known.

The demo model learns from these, and calibration, evaluation and the tests measure on them, so
nothing has to be downloaded and every answer is right by construction. A scene is two to five
objects on a 3 x 3 grid; an answer needs the object, its color and its place to be bound together.

Everything follows from the seed. Train, calibration and held-out scenes are disjoint by
construction: a digest of what stands where (not of the drawing) decides the split, so a held-out
arrangement is never seen in training, not even drawn a little differently.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from yopo.demo.questions import ANSWERS, KINDS, SHORT_KINDS, candidates
from yopo.demo.vocabulary import COLORS, GRID, SHAPES

IMAGE_SIZE = 64
SPLITS = ("heldout", "calibration", "train")
MIN_OBJECTS, MAX_OBJECTS = 2, 5

_JITTER = 2  # pixels that a center may leave its cell's center by
_RADII = (6, 7, 8)  # with the jitter, no object leaves its cell: objects never overlap
# What a talk is made of: finding one object, then comparing two, is what a model learns last.
_TURN_KINDS = ("color", "shape", "count", "existence", *["position"] * 3, *["relation"] * 5)
_SHADE = 14  # how far each RGB channel may stray from the named color


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
        """Return a stable hex digest of what stands where; the drawing does not enter."""
        text = ";".join(f"{o.color} {o.shape} {o.row} {o.col}" for o in self.objects)
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self) -> str:
        """Return "heldout", "calibration" or "train": digest modulo 10 is 0, 1 or the rest."""
        return SPLITS[min(int(self.digest(), 16) % 10, 2)]

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


@dataclass(frozen=True)
class DemoPair:
    """An image, a question about it and its only right answer."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    id: str


@dataclass(frozen=True)
class Turn:
    """One question and answer of a longer talk about the same scene."""

    question: str
    answer: str
    kind: str


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene from `rng`.

    Each scene uses a random part of the colors and shapes: a full palette would leave few scenes
    with three red objects, and counts would be guessable.
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


def split_scenes(split: str, *, seed: int = 0) -> Iterator[Scene]:
    """Yield scenes of one split without end."""
    _check_split(split)
    rng = random.Random(f"yopo scenes/{split}/{seed}")
    while True:
        scene = random_scene(rng)
        if scene.split() == split:
            yield scene


def pairs(
    split: str, count: int, *, seed: int = 0, kinds: Sequence[str] | None = None
) -> Iterator[DemoPair]:
    """Yield `count` question-answer pairs, one scene each, the kinds in turn.

    The wanted answer is drawn first, uniformly, and scenes are drawn until one has a question with
    that answer: guessing the commonest answer gains nothing. Pair `i` does not depend on `count`.

    Args:
        split: "train", "calibration" or "heldout".
        count: how many pairs.
        seed: another seed, other pairs.
        kinds: which kinds to cycle through. None means the six short kinds; "description", whose
            answers are 32 to 40 tokens long and whose score means something else (every token must
            be right), comes only when named.

    Raises:
        ValueError: for an unknown split or kind.
    """
    _check_split(split)
    wanted = tuple(kinds) if kinds is not None else SHORT_KINDS
    if not wanted or not set(wanted) <= set(KINDS):
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}; got {wanted!r}")
    for index in range(count):
        kind = wanted[index % len(wanted)]
        rng = random.Random(f"yopo pairs/{split}/{seed}/{kind}/{index}")
        scene, question, answer = _ask(split, kind, rng)
        yield DemoPair(scene.render(), question, answer, kind, f"{split}-{seed}-{index:05d}-{kind}")


def turns(
    split: str, *, seed: int = 0, num_turns: int = 12, description_share: float = 0.15
) -> Iterator[tuple[Scene, tuple[Turn, ...]]]:
    """Yield scenes with several questions each, without end: what the demo model is trained on.

    A description counts as four turns, so that all scenes make sequences of about one length; it
    stands last, where it gives no answer away.
    """
    rng = random.Random(f"yopo turns/{split}/{seed}")
    for scene in split_scenes(split, seed=seed):
        is_described = rng.random() < description_share
        described = candidates(scene.objects, "description") if is_described else []
        kinds = list(_TURN_KINDS) * 2  # more than are asked: some find no question, or an asked one
        rng.shuffle(kinds)
        asked: dict[str, Turn] = {}
        for kind in kinds:
            if len(asked) == num_turns - 4 * len(described):
                break
            found = candidates(scene.objects, kind)
            if found:
                answer = rng.choice(sorted({answer for _, answer in found}))
                question = rng.choice([q for q, a in found if a == answer])
                asked[question] = Turn(question, answer, kind)
        final = [Turn(q, a, "description") for q, a in described]
        yield scene, (*asked.values(), *final)


def _ask(split: str, kind: str, rng: random.Random) -> tuple[Scene, str, str]:
    """Find a scene of the split that has a question of this kind with a uniformly drawn answer."""
    wanted = rng.choice(ANSWERS[kind]) if kind in ANSWERS else None
    while True:
        scene = random_scene(rng)
        if scene.split() != split:
            continue
        found = [c for c in candidates(scene.objects, kind) if wanted in (None, c[1])]
        if found:
            return scene, *rng.choice(found)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")


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
