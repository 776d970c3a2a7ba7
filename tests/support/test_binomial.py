"""Clopper-Pearson bounds: known values, their definition, and what they promise."""

from __future__ import annotations

import math

import pytest

from yopo.support.binomial import interval, trials_needed, upper_bound


@pytest.mark.parametrize(
    ("events", "trials", "expected"),
    [
        (0, 64, 1 - 0.05 ** (1 / 64)),
        (0, 1, 0.95),
        (1, 10, 0.394163),
        (3, 20, 0.343664),
        (5, 100, 0.102253),
        (10, 10, 1.0),
        (0, 0, 1.0),
    ],
)
def test_upper_bounds_are_the_published_ones(events: int, trials: int, expected: float) -> None:
    assert upper_bound(events, trials) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("events", "trials", "lower", "upper"),
    [(8, 8, 0.630584, 1.0), (0, 8, 0.0, 0.369417), (7, 10, 0.347547, 0.933260)],
)
def test_intervals_are_the_published_ones(
    events: int, trials: int, lower: float, upper: float
) -> None:
    assert interval(events, trials) == pytest.approx((lower, upper), abs=2e-6)


@pytest.mark.parametrize(("events", "trials"), [(0, 7), (2, 9), (17, 40), (120, 300), (299, 300)])
def test_a_bound_is_where_the_tail_has_what_confidence_leaves(events: int, trials: int) -> None:
    bound = upper_bound(events, trials)
    tail = sum(
        math.comb(trials, count) * bound**count * (1 - bound) ** (trials - count)
        for count in range(events + 1)
    )
    assert tail == pytest.approx(0.05, rel=1e-6)


def test_bounds_hold_for_many_trials() -> None:
    """At a million trials the bound is the normal one: 1.645 standard errors above the share."""
    share, trials = 0.01, 10**6
    error = math.sqrt(share * (1 - share) / trials)
    assert upper_bound(round(share * trials), trials) == pytest.approx(
        share + 1.645 * error, rel=1e-3
    )


@pytest.mark.parametrize("bound", [0.5, 0.05, 0.01, 0.001])
def test_the_trials_needed_suffice_and_one_less_does_not(bound: float) -> None:
    needed = trials_needed(bound)
    assert upper_bound(0, needed) <= bound + 1e-12 < upper_bound(0, needed - 1)


def test_counts_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 3"):
        upper_bound(4, 3)
