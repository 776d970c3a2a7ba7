"""Neurons compete by their share of a layer's importance, not by importance itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yopo.strategies.neurons import rank, select_widths

SCALES = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)


@given(seed=st.integers(0, 999), count=st.integers(0, 30))
def test_the_scale_of_a_layer_does_not_matter(seed: int, count: int) -> None:
    importance = torch.rand(3, 10, generator=torch.Generator().manual_seed(seed)).double()
    usual, scaled = (
        select_widths(rank(each, [0, 1, 2]), count, 3)
        for each in (importance, importance * SCALES[:, None])
    )
    assert usual == scaled and sum(usual) == count


def test_the_same_distribution_at_any_scale_gets_the_same_neurons() -> None:
    row = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    for count, width in ((3, 1), (6, 2), (12, 4)):
        assert select_widths(rank(row * SCALES[:, None], [0, 1, 2]), count, 3) == [width] * 3


def test_a_concentrated_layer_comes_first_even_if_faint() -> None:
    """One neuron has all importance of the faint layer, and a quarter of the other's."""
    importance = torch.tensor([[100.0] * 4, [0.01, 0.0, 0.0, 0.0]])
    assert select_widths(rank(importance, [0, 1]), 1, 2) == [0, 1]
    assert select_widths(rank(importance, [0, 1]), 5, 2) == [4, 1]


@pytest.mark.parametrize("layers", [[], [2], [0, 2]])
def test_closed_layers_get_no_neurons(layers: list[int]) -> None:
    widths = select_widths(rank(torch.ones(3, 4), layers), 100, 3)
    assert widths == [4 if index in layers else 0 for index in range(3)]
