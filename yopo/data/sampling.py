"""Samples the rows of a source by a seed, in the source's order."""

from __future__ import annotations

import random

from yopo.support.console import warn
from yopo.support.errors import DataError


def check_samples(samples: int | None) -> None:
    """Refuse an empty sample.

    Raises:
        DataError: ``samples`` is zero or negative.
    """
    if samples is not None and samples < 1:
        raise DataError(f"The number of samples must be at least 1, found {samples}.")


def warn_all_used(where: str, samples: int, available: int) -> None:
    """Warn that a source holds fewer pairs than requested."""
    warn(f"{where}: {samples} samples were requested, but there are {available}; using all.")


def chosen(available: int, samples: int | None, seed: int, *, where: str) -> list[int]:
    """Draw rows without replacement, in ascending order.

    Draws are nested: with the same seed, a smaller sample is a subset of a larger one.

    Args:
        available: Number of rows.
        samples: Number to draw; None means all. More than available: all, with a warning.
        seed: Determines the rows.
        where: The source's name in the warning.
    """
    if samples is None:
        return list(range(available))
    if samples > available:
        warn_all_used(where, samples, available)
    numbers = list(range(available))
    random.Random(seed).shuffle(numbers)
    return sorted(numbers[:samples])
