"""Several sources of pairs, drawn from by their weights: ``a.jsonl:0.7`` and ``b.parquet:0.3``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from yopo.data.drawing import Draw
from yopo.data.pairs import Pair, Pairs
from yopo.support.errors import DataError

_WEIGHTED = re.compile(r"(?P<data>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class Part:
    """One of several sources.

    Attributes:
        data: Its name, without the weight.
        weight: Its share of the pairs, relative to the others' weights.
    """

    data: str
    weight: float = 1.0


def parts_of(named: Sequence[str]) -> list[Part]:
    """Parse sources with weights; a file whose name ends like a weight is taken as it is.

    Raises:
        DataError: A weight is zero.
    """
    parts = []
    for name in named:
        found = _WEIGHTED.fullmatch(name)
        if found is None or Path(name).expanduser().exists():
            parts.append(Part(name))
            continue
        part = Part(found["data"], float(found["weight"]))
        if not part.weight > 0:
            raise DataError(
                f"{name}: the weight of a source must be positive.",
                remedy="Leave the source out, or give it a weight: FILE:0.3.",
            )
        parts.append(part)
    return parts


def mixed(parts: Sequence[Part], how: Draw, open_part: Callable[[Part, Draw], Pairs]) -> Pairs:
    """Pairs of several sources, one after another, as many of each as its weight says.

    Args:
        parts: At least two.
        how: How many of all together; None: all of each, so that weights must be equal.
        open_part: Opens one of them.

    Raises:
        DataError: A source cannot be opened; or weights without a number of samples.
    """
    weights = [part.weight for part in parts]
    if how.samples is None and len(set(weights)) > 1:
        raise DataError(
            "Weights of several sources have no meaning if all pairs are taken.",
            remedy="Give a number of pairs (--samples 256), or no weights.",
        )
    if how.samples is None:
        opened = [open_part(part, how) for part in parts]
    else:
        counts = shares(how.samples, weights)
        if min(counts) < 1:
            raise DataError(
                f"{how.samples} samples are too few for {len(parts)} sources with these weights.",
                remedy="Give a larger --samples.",
            )
        opened = [
            open_part(part, replace(how, samples=count))
            for part, count in zip(parts, counts, strict=True)
        ]
    total = sum(weights)
    names = [
        f"{each.name} ({part.weight / total:.0%})" for each, part in zip(opened, parts, strict=True)
    ]
    totals = [each.total for each in opened]
    known = [each for each in totals if each is not None]
    return Pairs(
        name=" + ".join(names),
        total=sum(known) if len(known) == len(totals) else None,
        digest=_digest(opened),
        read=partial(_chain, opened),
    )


def shares(samples: int, weights: Sequence[float]) -> list[int]:
    """Divide samples by weight, so that they add up: the largest remainders are rounded up."""
    exact = [samples * weight / sum(weights) for weight in weights]
    counts = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])
    for place in by_remainder[: samples - sum(counts)]:
        counts[place] += 1
    return counts


def _digest(opened: Sequence[Pairs]) -> str | None:
    digests = [each.digest for each in opened]
    if any(digest is None for digest in digests):
        return None
    return hashlib.sha256(" ".join(map(str, digests)).encode()).hexdigest()


def _chain(opened: Sequence[Pairs]) -> Iterator[Pair]:
    for each in opened:
        yield from each
