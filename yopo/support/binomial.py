"""Exact confidence bounds of a share, from its counts (Clopper and Pearson, Biometrika 1934).

A share that was counted on few trials says little: no error in 64 answers leaves room for 4.6 %.
"""

from __future__ import annotations

import math

CONFIDENCE = 0.95
"""Of all bounds and intervals that are reported."""

_HALVINGS = 60
"""Of the interval [0, 1]: to the last bit of a double."""

_NEGLIGIBLE = 1e-17
"""Of a sum: terms below this share of it change nothing."""


def upper_bound(events: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided upper bound of an event's probability.

    Args:
        events: How often it was seen.
        trials: How often it could have been seen.
        confidence: Probability that the bound holds, in (0, 1).

    Returns:
        The largest probability under which ``events`` or fewer have a probability of at least
        1 - ``confidence``; 1 without trials.

    Raises:
        ValueError: ``events`` is not between 0 and ``trials``.
    """
    if not 0 <= events <= trials:
        raise ValueError(f"events must lie between 0 and {trials}, found {events}")
    if events == trials:
        return 1.0
    low, high = events / trials, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _at_most(events, trials, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def interval(events: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two-sided interval of an event's probability; arguments as for :func:`upper_bound`.

    Returns:
        (lower, upper); (0, 1) without trials.
    """
    side = (1 + confidence) / 2
    lower = 1 - upper_bound(trials - events, trials, side)
    return lower, upper_bound(events, trials, side)


def trials_needed(bound: float, confidence: float = CONFIDENCE) -> int:
    """Trials whose upper bound is at most ``bound``, in (0, 1], if the event is never seen."""
    if bound >= 1:
        return 1
    return math.ceil(math.log(1 - confidence) / math.log1p(-bound) - 1e-9)


def _at_most(events: int, trials: int, probability: float) -> float:
    """Probability of ``events`` or fewer, ``probability`` being at least ``events / trials``.

    Summed downwards from its largest term, until the terms no longer count.
    """
    if probability >= 1:
        return 0.0
    choose = math.lgamma(trials + 1) - math.lgamma(events + 1) - math.lgamma(trials - events + 1)
    hit = events * math.log(probability) if events else 0.0
    term = math.exp(choose + hit + (trials - events) * math.log1p(-probability))
    total, odds = term, (1 - probability) / probability if probability else math.inf
    for count in range(events, 0, -1):
        term *= count / (trials - count + 1) * odds
        total += term
        if term <= _NEGLIGIBLE * total:
            break
    return total
