"""Heads are kept by the authors' vote to the letter, with its definition of active."""

from __future__ import annotations

import pytest
import torch

from yopo.strategies.heads import VOTE_SHARE, select_vote

ALPHA = 0.5


def activity(active: int, samples: int, *, idle: float = 0.0) -> torch.Tensor:
    """Make (samples, 3 layers, 2 heads) rho with head 1 active in this many samples at the end."""
    rho = torch.full((samples, 3, 2), idle)
    rho[:active, 2, 1] = 2 * ALPHA
    return rho


@pytest.mark.parametrize(("active", "samples"), [(40, 100), (2, 5), (4, 10), (100, 250)])
def test_a_head_needs_more_than_the_share_of_samples(active: int, samples: int) -> None:
    """The authors keep a head that is active in more than 40 of 100 samples."""
    assert active == VOTE_SHARE * samples
    kept = [
        select_vote(activity(each, samples), ALPHA)[2].tolist() for each in (active, active + 1)
    ]
    assert kept == [[False, False], [False, True]]


def test_a_head_exactly_at_alpha_is_not_active() -> None:
    at = activity(0, 10, idle=ALPHA)
    assert not select_vote(at, ALPHA)[2].any()
    assert select_vote(at.nextafter(torch.tensor(1.0)), ALPHA)[2].all()


def test_the_first_two_layers_keep_every_head() -> None:
    assert select_vote(activity(0, 10), ALPHA).tolist() == [[True] * 2, [True] * 2, [False] * 2]
    assert not select_vote(activity(0, 10), ALPHA, whole_layers=0).any()
