"""Which rows of a source are used: drawn by a seed, kept in the source's order."""

from __future__ import annotations

import random

from yopo.support.console import warn
from yopo.support.errors import DataError


def check_samples(samples: int | None) -> None:
    """Refuse a sample of nothing.

    Raises:
        DataError: ``samples`` is zero or negative.
    """
    if samples is not None and samples < 1:
        raise DataError(f"The number of samples must be at least 1, found {samples}.")


def warn_all_used(where: str, samples: int, available: int) -> None:
    """Say that a source holds fewer pairs than were asked for."""
    warn(f"{where}: {samples} samples were asked for, there are {available}; using all.")


def chosen(available: int, samples: int | None, seed: int, *, where: str) -> list[int]:
    """Draw rows without replacement, in ascending order.

    The draw is nested: with the same seed, fewer samples are a part of more samples.

    Args:
        available: Number of rows.
        samples: How many to draw; None means all. More than there are: all, with a warning.
        seed: Another seed, other rows.
        where: The source in the warning.
    """
    if samples is None:
        return list(range(available))
    if samples > available:
        warn_all_used(where, samples, available)
    numbers = list(range(available))
    random.Random(seed).shuffle(numbers)
    return sorted(numbers[:samples])
