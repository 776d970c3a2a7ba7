"""Sizes of images: told apart without decoding them, and varied by resizing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from yopo.data.pairs import ImageRef, Pair, Pairs, ResizedRef
from yopo.support.errors import DataError
from yopo.support.reading import open_regular

WINDOW = 1024
"""Pairs that are sorted by the sizes of their images at a time."""

MAX_SCALE = 8.0
"""Of an image's sides: more makes every image the largest that a processor takes."""


def check_scales(scales: Sequence[float]) -> None:
    """Refuse scales that make no image.

    Raises:
        DataError: None, or one out of range.
    """
    wrong = [scale for scale in scales if not 1 / MAX_SCALE <= scale <= MAX_SCALE]
    if wrong or not scales:
        found = wrong[0] if wrong else "none"
        raise DataError(
            f"The scales of images must lie between {1 / MAX_SCALE:g} and {MAX_SCALE:g}, found "
            f"{found}.",
            remedy="Give factors of their sides, as in --grids 1,1.5.",
        )


def in_sizes(pairs: Pairs, scales: Sequence[float]) -> Pairs:
    """A source of the same pairs, their images resized (see :func:`resized`).

    Raises:
        DataError: A scale is out of range.
    """
    check_scales(scales)
    if set(scales) == {1}:
        return pairs
    return replace(pairs, read=partial(resized, pairs, tuple(scales)))


def resized(pairs: Iterable[Pair], scales: Sequence[float]) -> Iterator[Pair]:
    """Pairs with their images resized, each pair by the next of some scales in turn.

    The turn is the number of a pair in the source, so a pair's scale does not depend on what else
    is drawn.

    Args:
        pairs: All of a source, in its order.
        scales: Factors of both sides; 1 leaves an image as it is.
    """
    for number, pair in enumerate(pairs):
        scale = scales[number % len(scales)]
        yield pair if scale == 1 else scaled(pair, scale)


def scaled(pair: Pair, scale: float) -> Pair:
    """A pair with all its images resized."""
    images = tuple(ResizedRef(image.source, image.label, scale) for image in pair.images)
    return replace(pair, images=images)


def by_size(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Pairs with those next to each other whose images have the same sizes.

    Batches of equal grids need no padding, and their rows share no attention blocks. Otherwise the
    order stays. At most ``WINDOW`` pairs are held at a time.
    """
    rest = iter(pairs)
    while window := list(islice(rest, WINDOW)):
        yield from sorted(window, key=_dimensions)


def _dimensions(pair: Pair) -> list[tuple[float, ...]]:
    """(width, height) of every image, from its header; () where that is not known at once."""
    return [*(_sides(image) or () for image in pair.images), *((),) * len(pair.videos)]


def size_class(pair: Pair) -> int | None:
    """The octave of a pair's pixels, all images together; None if it is not known at once."""
    if pair.videos:
        return None
    areas = [_area(image) for image in pair.images]
    known = [area for area in areas if area]
    return math.floor(math.log2(sum(known))) if len(known) == len(areas) else None


def pixels_of(pair: Pair) -> float:
    """Pixels of a pair's images, as far as they are known at once."""
    return sum(_area(image) or 0.0 for image in pair.images)


def _area(image: ImageRef) -> float | None:
    """Pixels of an image; None if they are not known at once."""
    sides = _sides(image)
    return None if sides is None else sides[0] * sides[1]


def _sides(image: ImageRef) -> tuple[float, float] | None:
    """(width, height), from an image's header; None for a remote one, or one that is none."""
    from PIL import Image

    source = image.source
    scale = image.scale if isinstance(image, ResizedRef) else 1.0
    if isinstance(source, Image.Image):
        return scale * source.width, scale * source.height
    if isinstance(source, str):
        return None
    try:
        with _opened(source) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                return scale * opened.width, scale * opened.height
    except Exception:  # decoders raise all sorts of things; whoever decodes it says what is wrong
        return None


def _opened(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    return open_regular(source, error=DataError)[0]
