"""Shared sums of products are exact, so that neither order nor division matters."""

from __future__ import annotations

from math import fsum

import pytest
import torch

from yopo.fitting.products import Products, SharedProducts


def rows(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches of 5 columns whose sizes differ by a factor of a million, one of them silent in the
    first batch."""
    source = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1e-3, 1.0, 30.0, 1e3, 1.0])
    found = [torch.randn(40, 5, generator=source) * sizes for _ in range(count)]
    found[0][:, 4] = 0
    return found


def shared(batches: list[torch.Tensor]) -> torch.Tensor:
    sums = SharedProducts(3, 5, "cpu")
    for batch in batches:
        sums.add(batch)
    return sums.totals()[2]


def test_they_are_the_exact_sum_of_the_batches_products_rounded_once() -> None:
    batches = rows(50)
    expected = [
        [fsum(float((each[:, :3].T @ each)[i, j]) for each in batches) for j in range(5)]
        for i in range(3)
    ]
    assert torch.equal(shared(batches), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_they_do_not_depend_on_the_order(processes: int) -> None:
    first, *rest = rows(200)
    dealt = [each for start in range(processes) for each in rest[start::processes]]
    assert torch.equal(shared([first, *rest]), shared([first, *dealt]))


def test_they_are_the_sums_of_one_process_up_to_rounding() -> None:
    batches, plain = rows(30), Products(3, 5, "cpu")
    together = SharedProducts(3, 5, "cpu")
    for batch in batches:
        plain.add(batch)
        together.add(batch)
    for ours, expected in zip(together.totals(), plain.totals(), strict=True):
        torch.testing.assert_close(
            torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-14, atol=1e-14
        )
