"""Draws the pairs of a source by a seed: evenly over its kinds, and only those that can be used."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from yopo.data.left_out import LeftOut
from yopo.data.pairs import ImageRef, Pair
from yopo.data.rows import other_media
from yopo.support.console import note, track, warn
from yopo.support.errors import DataError

DEFAULT_SAMPLES = 256
"""Pairs drawn unless more are asked for: the paper's scores are steady from far fewer."""

Read = Callable[[Sequence[int]], Iterator[tuple[int, Pair]]]
"""Pairs of some rows by number, in that order; unusable rows are counted and left out."""


@dataclass(frozen=True)
class Draw:
    """How pairs are drawn from a source.

    Attributes:
        samples: How many; None: all.
        seed: Determines which.
        strict: Whether a row that cannot be used is an error; otherwise it is counted and left out.
        videos: Whether rows about videos can be used.

    Raises:
        DataError: No samples.
    """

    samples: int | None
    seed: int = 0
    strict: bool = False
    videos: bool = False

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise DataError(f"The number of samples must be at least 1, found {self.samples}.")


def warn_all_used(where: str, samples: int, available: int) -> None:
    """Warn that a source holds fewer pairs than requested."""
    warn(f"{where}: {samples} samples were requested, but there are {available}; using all.")


def evenly(strata: Sequence[Hashable], seed: int) -> Sequence[int]:
    """Positions in a random order in which every stratum has its turn, until it is used up.

    The order does not depend on how many are taken, so a smaller sample is a subset of a larger
    one. With one stratum it is a plain shuffle.

    Args:
        strata: What each position belongs to: a kind of question, a file, both.
        seed: Determines the order.
    """
    order = array("Q", range(len(strata)))
    random.Random(seed).shuffle(order)
    queues: dict[Hashable, array[int]] = {}
    for position in order:
        queues.setdefault(strata[position], array("Q")).append(position)
    found, waiting, turn = array("Q"), list(queues.values()), 0
    while waiting:
        found.extend(queue[turn] for queue in waiting)
        turn += 1
        waiting = [queue for queue in waiting if turn < len(queue)]
    return found


def draw(
    how: Draw,
    where: str,
    numbers: Sequence[int],
    strata: Sequence[Hashable],
    read: Read,
    left_out: LeftOut,
    *,
    is_scanned: bool,
) -> list[int]:
    """Draw usable rows, and decode their images once: before anything slow runs.

    Rows that turn out to be unusable are replaced by the next ones in the order of the draw.

    Args:
        how: How many, and the seed.
        where: The source's name in messages.
        numbers: The rows to draw from.
        strata: What each of them belongs to.
        read: Reads some of them.
        left_out: Counts those that cannot be used.
        is_scanned: Whether all rows of the source were looked at, not only those that are drawn.

    Returns:
        Numbers of rows, ascending.

    Raises:
        DataError: No row can be used; or, under ``strict``, one of the drawn rows.
    """
    wanted = len(numbers) if how.samples is None else how.samples
    before, order = left_out.count, evenly(strata, how.seed)
    kept: list[int] = []
    place, decoder = 0, Decoder(left_out, videos=how.videos)
    while len(kept) < wanted and place < len(order):
        some = sorted(numbers[each] for each in order[place : place + wanted - len(kept)])
        place += len(some)
        reading = track(read(some), label="checking images", total=len(some), unit="pairs")
        kept += [number for number, pair in reading if decoder.decodes(pair)]
    left_out.refuse_if_nothing_is_left(len(kept))
    usable = len(order) - (left_out.count - before)
    left_out.report(before + len(order) if is_scanned else place)
    if how.samples is not None and len(kept) < how.samples:
        warn_all_used(where, how.samples, len(kept))
    elif how.samples is not None and len(kept) < usable:
        _note_draw(where, len(kept), usable, len(set(strata)))
    return sorted(kept)


def _note_draw(where: str, kept: int, available: int, strata: int) -> None:
    over = f", evenly over {strata} kinds" if strata > 1 else ""
    note(f"{where}: using {kept} of {available} pairs{over} (--samples N, or all).")


class Decoder:
    """Decodes the images and videos of pairs to see whether that works, each file once.

    Args:
        left_out: Counts the pairs for which it does not.
        videos: Whether videos can be used at all.
    """

    def __init__(self, left_out: LeftOut, *, videos: bool = False):
        self._left_out, self._takes_videos = left_out, videos
        self._fine: set[Path] = set()

    def decodes(self, pair: Pair) -> bool:
        """Whether a pair's images and videos can be decoded; if not, it is left out.

        Raises:
            DataError: One cannot, under ``strict``.
        """
        try:
            for image in pair.images:
                self._decode(image)
            for video in pair.videos:
                if not self._takes_videos:
                    raise other_media("video", pair.where)
                if video.source not in self._fine:
                    video.load(max_frames=1)
                    self._fine.add(video.source)
        except DataError as error:
            self._left_out.add(error)
            return False
        return True

    def _decode(self, image: ImageRef) -> None:
        source = image.source
        if isinstance(source, Path) and source in self._fine:
            return
        image.load()
        if isinstance(source, Path):
            self._fine.add(source)
