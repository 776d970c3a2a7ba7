"""Sums of products over batches: in one process, or of all processes, whatever their number."""

from __future__ import annotations

import torch

from yopo.support.ranks import added, gathered, is_together, of_first

MAX_EXPONENT = 24
"""Of the powers of two that columns are scaled by: products of float32 must not overflow."""

COARSE = 1.5 * 2.0**32
"""Adding this and subtracting it again rounds a float64 below 2^31 to a multiple of 2^-20."""


class Products:
    """Float64 sums over batches of rows x: of x, and of the products ``x_i x_j``.

    Args:
        inputs: Number of columns i.
        width: Number of columns j, of which the inputs are the first.
        device: Device of the sums.
    """

    def __init__(self, inputs: int, width: int, device: torch.device | str):
        self.precise = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.inputs, self._count = inputs, 0
        self._sum = torch.zeros(width, dtype=self.precise, device=device)
        self._products = torch.zeros(inputs, width, dtype=self.precise, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Add (rows, width) float32."""
        self._count += len(rows)
        self._sum += rows.sum(dim=0, dtype=self.precise)
        self._products += rows[:, : self.inputs].T @ rows

    def totals(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Number of rows, (width,) sum and (inputs, width) sum of products."""
        return self._count, self._sum, self._products


class SharedProducts(Products):
    """The sums of all processes, the same bits whatever their number.

    A float64 sum of float32 products is exact as long as these do not differ too much. To have it
    exact whatever they are, columns are scaled by powers of two to about unit energy, and each
    product is split at 2^-20: the sum of the upper parts and that of the lower ones are exact, so
    their order does not matter, and both together are rounded once. Sums of x, which are small, are
    added in the order of the batches, as in one process.
    """

    def __init__(self, inputs: int, width: int, device: torch.device | str):
        super().__init__(inputs, width, device)
        self._lower = torch.zeros_like(self._products)
        self._scale: torch.Tensor | None = None
        self._batches: list[tuple[int, torch.Tensor]] = []

    def add(self, rows: torch.Tensor) -> None:
        """Add (rows, width) float32."""
        if self._scale is None:
            self._scale = of_first(_scale_of(rows))
        self._batches.append((len(rows), rows.sum(dim=0, dtype=self.precise).cpu()))
        scaled = rows * self._scale
        product = (scaled[:, : self.inputs].T @ scaled).to(self.precise)
        upper = (product + COARSE) - COARSE
        self._products += upper
        self._lower += product.sub_(upper)

    def totals(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Number of rows, (width,) sum and (inputs, width) sum of products of all processes."""
        assert self._scale is not None, "every process adds a batch"
        count, total = 0, torch.zeros_like(self._sum, device="cpu")
        for rows, sums in gathered(self._batches):
            count += rows
            total += sums
        products = added(self._products) + added(self._lower)
        scale = self._scale.to(self.precise)
        products = products / scale[: self.inputs, None] / scale
        return count, total.to(products.device), products


def products(inputs: int, width: int, device: torch.device | str) -> Products:
    """Sums of this process, or of all that work together."""
    return (SharedProducts if is_together() else Products)(inputs, width, device)


def _scale_of(rows: torch.Tensor) -> torch.Tensor:
    """(width,) float32 powers of two that scale columns to a norm of about 1."""
    norms = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
    exponents = -norms.clamp(min=2.0**-MAX_EXPONENT, max=2.0**MAX_EXPONENT).log2().round()
    return torch.where(norms > 0, exponents.exp2(), 1.0)
