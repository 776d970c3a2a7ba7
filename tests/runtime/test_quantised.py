"""Numbers in few bits: what is read is near what was written, whole or block by block."""

from __future__ import annotations

import pytest
import torch

from yopo.plans.kv_storage import LEVELS, bytes_of_head, group_width
from yopo.runtime import quantised
from yopo.runtime.reference import in_few_bits

WIDTHS = (16, 10, 96, 128, 160, 256)
"""Of heads: with one group and with several, with bytes that are not full."""


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("width", WIDTHS)
def test_reading_is_as_specified_and_within_half_a_step_unless_clipped(
    width: int, bits: int
) -> None:
    numbers = draw(2, 3, 5, width)
    packed, codes = quantised.quantise(numbers, bits)
    found = quantised.dequantise(packed, codes, bits, width, torch.float64)
    step = quantised.steps_of(codes, torch.float64)
    step = step.repeat_interleave(group_width(width), dim=-1)
    outermost = step * (2**bits - 1) / 2
    assert torch.allclose(found, in_few_bits(numbers, bits), rtol=1e-12, atol=0)
    is_clipped = numbers.abs() > outermost + step / 2
    assert ((found - numbers).abs() <= step * 0.5001)[~is_clipped].all()
    assert torch.allclose(found.abs()[is_clipped], outermost[is_clipped])
    assert is_clipped.any() or bits > 2
    assert not is_clipped.any() or bits < 8
    assert packed[0, 0, 0].nbytes + codes[0, 0, 0].nbytes == bytes_of_head(width, bits, 8)
    groups = found.unflatten(-1, (-1, group_width(width)))
    assert max(len(group.unique()) for group in groups.flatten(0, -2)) <= 1 << bits


def squared_error(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    read = quantised.quantise(numbers, bits)
    found = quantised.dequantise(*read, bits, numbers.shape[-1], torch.float64)
    return (found - numbers).square().sum(dim=-1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("width", [16, 128])
def test_clipping_large_numbers_lowers_the_error(
    width: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = draw(500, width)
    clipped = squared_error(numbers, bits)
    monkeypatch.setattr(quantised, "NARROWER", {bits: (0,)})
    whole = squared_error(numbers, bits)
    assert (clipped <= whole * (1 + 1e-12)).all() and (clipped < whole).any()
    if bits == 2:
        assert clipped.sum() < 0.85 * whole.sum()


@pytest.mark.parametrize("bits", LEVELS)
def test_what_is_nothing_or_beyond_the_largest_step_stays_finite(bits: int) -> None:
    numbers = torch.tensor([[0.0] * 8, [1e30, *[1.0] * 7], [1e-30] * 8])
    found = quantised.dequantise(*quantised.quantise(numbers, bits), bits, 8, torch.float32)
    assert torch.isfinite(found).all()
    assert torch.equal(found[[0, 2]], torch.zeros(2, 8))
    assert found[1, 0] == found.max() > 5600
    assert torch.equal(found[[0, 1]], in_few_bits(numbers, bits)[[0, 1]])


@pytest.mark.parametrize("block_bytes", [1, 1 << 9, 1 << 20], ids=["keys", "parts", "whole"])
@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("width", [10, 96, 128])
def test_reading_block_by_block_is_reading_at_once(
    width: int, bits: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "BLOCK_BYTES", block_bytes)
    numbers, queries, weights = draw(4, 21, width), draw(4, 3, width, seed=1), draw(4, 3, 21)
    packed, codes = quantised.quantise(numbers, bits)
    read = quantised.dequantise(packed, codes, bits, width, torch.float64)
    scores = quantised.scores(queries, packed, codes, bits)
    torch.testing.assert_close(scores, queries @ read.transpose(1, 2), rtol=1e-9, atol=1e-9)
    mixed = quantised.mixture(weights, packed, codes, bits, width)
    torch.testing.assert_close(mixed, weights @ read, rtol=1e-9, atol=1e-9)
