"""Splits pairs into those to fit on and those to judge on; no pair or image is in both.

A plan that is judged on the pairs it was fitted on looks better than it is, especially with few
pairs. So the pairs are split before anything is measured. Pairs that share an image are kept on one
side: they differ only in their questions and would leak the answer. Images are the same if their
bytes are; a copy in another format or size is not recognized.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from yopo.data.pairs import ImageRef, Pair
from yopo.data.sizes import size_class
from yopo.data.videos import VideoRef
from yopo.support.console import warn
from yopo.support.errors import DataError

FEW = 32
"""Fewer pairs than this give a warning."""

MIN_SIDE = 8
"""Minimum pairs each for fitting, comparison and a tolerance: fewer only measure noise."""

Group = list[int]
"""Numbers of pairs that must be kept together."""


@dataclass(frozen=True)
class Split:
    """The purpose of each pair of a source, by its number in the source's order.

    Attributes:
        statistics: Pairs for scores and means.
        fit: Pairs for fitting visual weights: some or all of ``statistics``.
        comparison: Pairs only for comparing candidate plans. Empty if not requested, or if there
            are too few pairs.
        holdout: Pairs only for meeting a tolerance. Empty like ``comparison``.
        total: Pairs of the source.
        images: Number of groups of pairs that share an image.
    """

    statistics: frozenset[int]
    fit: frozenset[int]
    comparison: frozenset[int]
    holdout: frozenset[int]
    total: int
    images: int

    @property
    def summary(self) -> dict[str, int]:
        """The counts that plans record."""
        sides = {"statistics": self.statistics, "fit": self.fit}
        sides |= {"comparison": self.comparison, "holdout": self.holdout}
        return {name: len(numbers) for name, numbers in sides.items()}


def split_pairs(
    pairs: Iterable[Pair], *, seed: int, fit: int, comparison: int = 0, holdout: int = 0
) -> Split:
    """Split pairs at random, deterministically for a seed.

    Comparison and holdout get a quarter of all pairs each, but at least ``MIN_SIDE``, and never
    more than requested. If that leaves any purpose with less than ``MIN_SIDE``, nothing is held
    out.

    Args:
        pairs: Read once; images are digested, not decoded.
        seed: Determines the split.
        fit: Maximum pairs to fit weights on.
        comparison: Maximum pairs to compare plans on; 0 if none are needed.
        holdout: Maximum pairs to meet a tolerance on; 0 if none are needed.

    Raises:
        DataError: A pair or its image cannot be read.
    """
    classes: list[int | None] = []
    groups = group_by_image(_noting_sizes(pairs, classes))
    random.Random(seed).shuffle(groups)
    groups = _spread(groups, classes)
    everything = [number for group in groups for number in group]
    total = len(everything)
    share = max(total // 4, MIN_SIDE)
    kept_out, left = _take(groups, min(holdout, share))
    compared, left = _take(left, min(comparison, share))
    rest = [number for group in left for number in group]
    needed = [rest] + [compared] * bool(comparison) + [kept_out] * bool(holdout)
    if min(map(len, needed)) < MIN_SIDE:
        rest, compared, kept_out = everything, [], []
    return Split(
        statistics=frozenset(rest),
        fit=frozenset(rest[:fit]),
        comparison=frozenset(compared),
        holdout=frozenset(kept_out),
        total=total,
        images=len(groups),
    )


def pick(pairs: Iterable[Pair], numbers: frozenset[int]) -> Iterator[Pair]:
    """The pairs with these numbers, in the source's order; stops reading after the last."""
    if not numbers:
        return
    last = max(numbers)
    for number, pair in enumerate(pairs):
        if number in numbers:
            yield pair
        if number == last:
            return


def warn_if_few(split: Split) -> None:
    """Warn if there are too few pairs, or images, to generalize from."""
    if split.images < FEW:
        warn(
            f"Only {describe(split)} to calibrate on: the results may not generalize to other "
            f"images. Give at least {FEW}, preferably 256 (--data, --samples)."
        )


def too_few(split: Split, what: str, least: int) -> DataError:
    """The refusal of a split without enough pairs for a purpose."""
    return DataError(
        f"{describe(split)}: too few {what}, expected at least {least} of different images.",
        remedy="Give more pairs (--data, --samples).",
    )


def describe(split: Split) -> str:
    """The number of pairs, and of images if there are fewer."""
    pairs = f"{split.total} pair{'s' * (split.total != 1)}"
    if split.images == split.total:
        return pairs
    return f"{pairs} of {split.images} different image{'s' * (split.images != 1)}"


def group_by_image(pairs: Iterable[Pair]) -> list[Group]:
    """Group pairs that share an image, directly or through others, in order of first pair."""
    parents: list[int] = []
    first_with: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        parents.append(number)
        media: tuple[ImageRef | VideoRef, ...] = (*pair.images, *pair.videos)
        for image in media:
            other = first_with.setdefault(image_digest(image), number)
            roots = sorted((_root(parents, other), _root(parents, number)))
            parents[roots[1]] = roots[0]
    groups: dict[int, Group] = {}
    for number in range(len(parents)):
        groups.setdefault(_root(parents, number), []).append(number)
    return list(groups.values())


def _noting_sizes(pairs: Iterable[Pair], classes: list[int | None]) -> Iterator[Pair]:
    """The pairs; the size classes of their images are added to a list on the way."""
    for pair in pairs:
        classes.append(size_class(pair))
        yield pair


def _spread(groups: list[Group], classes: Sequence[int | None]) -> list[Group]:
    """Reorder groups so that any stretch of them has its share of every image size.

    Each size keeps its own order; with one size nothing changes.

    Args:
        groups: In random order.
        classes: Size class per pair; a group counts by its first.
    """
    by_class: dict[int | None, list[int]] = {}
    for place, group in enumerate(groups):
        by_class.setdefault(classes[group[0]], []).append(place)
    positions = {
        place: (rank + 0.5) / len(places)
        for places in by_class.values()
        for rank, place in enumerate(places)
    }
    return [groups[place] for place in sorted(positions, key=lambda each: (positions[each], each))]


def _root(parents: list[int], number: int) -> int:
    """The first number of a group: follows the chain of parents and shortens it."""
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


def _take(groups: Sequence[Group], wanted: int) -> tuple[Group, list[Group]]:
    """Take whole groups of at most ``wanted`` pairs; if none is that small, part of one.

    Returns:
        (numbers taken, groups left). The rest of a partly taken group is dropped.
    """
    taken: Group = []
    left: list[Group] = []
    for group in groups:
        if len(taken) + len(group) <= wanted:
            taken += group
        else:
            left.append(group)
    if wanted and not taken and len(left) > 1:
        smallest = min(left, key=len)
        taken = smallest[:wanted]
        left = [group for group in left if group is not smallest]
    return taken, left


def image_digest(image: ImageRef | VideoRef) -> str:
    """The identity of an image or a video: a digest of its bytes, or its address if it is remote.

    Raises:
        DataError: There is no such file.
    """
    source = image.source
    if isinstance(source, str):
        return source
    if isinstance(source, Path):
        image.check()
        try:
            with source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:  # decoding it reports the problem
            return str(source)
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    content = hashlib.sha256(f"{source.mode} {source.size}".encode())
    content.update(source.tobytes())
    return content.hexdigest()
