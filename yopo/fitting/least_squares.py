"""Least squares on Gram matrices: ridge, reduced rank, and the best bottleneck of a projection.

Everything is centred: a fit is ``y = W x + b`` with ``b`` chosen so that means agree, which makes
mean compensation (FLAP) the special case of a ``W`` that is not refitted. Sums are kept in at least
float32 and solved in float64; damping is relative to the mean diagonal of the covariance, so dead
or duplicate directions cannot make a solution blow up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from yopo.fitting.products import products
from yopo.support.ranks import of_first

DAMPING = 1e-3
"""Ridge term over the mean diagonal of the covariance."""

FLOOR = 1e-9
"""Least ridge term over the mean square of the means: the covariance of inputs that hardly vary is
rounding noise."""


WIDE = 1024
"""Width from which singular vectors come from subspace iterations: exact ones cost 9 d^3."""

ITERATIONS = 3
"""Subspace iterations: with them at most 0.7 % more is lost than by the best vectors, even where
all singular values are about as large (a test measures this)."""


@dataclass(frozen=True)
class Gram:
    """Centred second moments of inputs x and targets y, float64.

    Attributes:
        covariance: (inputs, inputs) of x.
        cross: (inputs, targets) between x and y.
        input_mean, target_mean: (inputs,) and (targets,).
    """

    covariance: torch.Tensor
    cross: torch.Tensor
    input_mean: torch.Tensor
    target_mean: torch.Tensor

    @cached_property
    def damped(self) -> torch.Tensor:
        """The covariance with ``DAMPING`` times its mean diagonal on the diagonal."""
        ridge = DAMPING * self.covariance.diagonal().mean().clamp(min=0)
        ridge = ridge + FLOOR * self.input_mean.square().mean() + 1e-30
        damped = self.covariance.clone()
        damped.diagonal().add_(ridge)
        return damped

    @cached_property
    def root(self) -> torch.Tensor:
        """Lower Cholesky factor of ``damped``."""
        return torch.linalg.cholesky(self.damped)

    def first(self, count: int) -> Gram:
        """The moments of only the first inputs."""
        covariance = self.covariance[:count, :count]
        return Gram(covariance, self.cross[:count], self.input_mean[:count], self.target_mean)

    def without(self, first: int, weight: torch.Tensor) -> Gram:
        """The moments of the first inputs; ``weight`` times the rest is subtracted from targets."""
        cross = self.cross[:first] - self.covariance[:first, first:] @ weight.T
        mean = self.target_mean - weight @ self.input_mean[first:]
        covariance = self.covariance[:first, :first]
        return Gram(covariance, cross, self.input_mean[:first], mean)


class Moments:
    """Running sums of inputs x and targets y over rows.

    The first rows' mean is subtracted first: products are computed in float32, in which large means
    would swamp small variances.

    Args:
        inputs, targets: Widths of x and y (0 targets: only x).
        device: Device of the sums.
    """

    def __init__(self, inputs: int, targets: int = 0, device: torch.device | str = "cpu"):
        self.count = 0
        self._origin: torch.Tensor | None = None
        self._sums = products(inputs, inputs + targets, device)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Add rows: (rows, inputs) and (rows, targets)."""
        inputs = inputs.float()
        both = inputs if targets is None else torch.cat([inputs, targets.float()], dim=1)
        if self._origin is None:
            self._origin = of_first(both.mean(dim=0))
        self.count += len(both)
        self._sums.add(both - self._origin)

    def gram(self) -> Gram:
        """The centred moments."""
        count, *sums = self._sums.totals()
        assert self._origin is not None, "no rows were added"
        home = "cpu" if sums[0].device.type == "mps" else sums[0].device  # has no float64
        shift, crossed, origin = (each.to(home).double() for each in (*sums, self._origin))
        shift, width = shift / count, self._sums.inputs
        centred = crossed / count - shift[:width, None] * shift[None]
        mean = origin + shift
        return Gram(centred[:, :width], centred[:, width:], mean[:width], mean[width:])


def ridge(gram: Gram, toward: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares, damped towards a weight (towards zero without one).

    Args:
        gram: Of x and y.
        toward: (targets, inputs) weight to stay close to where the data are uninformative.

    Returns:
        (targets, inputs) weight and (targets,) bias with ``y = weight x + bias``.
    """
    cross = gram.cross
    if toward is not None:
        cross = cross + (gram.damped - gram.covariance) @ toward.to(cross).T
    weight = torch.cholesky_solve(cross, gram.root).T
    return weight, gram.target_mean - weight @ gram.input_mean


def reduced_rank(gram: Gram, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Least squares through a bottleneck (reduced-rank regression).

    Returns:
        ((targets, rank) out, (rank, inputs) in, (targets,) bias) with ``y = out in x + bias``.
    """
    full, _ = ridge(gram)
    out, inner = low_rank(full, gram.root, rank)
    return out, inner, gram.target_mean - out @ (inner @ gram.input_mean)


def low_rank(
    weight: torch.Tensor, root: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors (rows, rank) and (rank, inputs) of a weight for inputs of covariance
    ``root root^T``."""
    seen = weight @ root
    # Several times cheaper than an SVD, and only large singular values matter.
    out = leading(seen @ seen.T, rank)
    return out, out.T @ weight


def leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading eigenvectors of a symmetric matrix without negative eigenvalues.

    From ``WIDE`` on they are approximated in the randomized subspace iteration of Halko et al.
    (arXiv 0909.4061), with a fixed seed.

    Returns:
        (width, rank) orthonormal columns, the largest eigenvalue first.
    """
    width = len(matrix)
    count = rank + rank // 4 + 16
    if width < WIDE or 2 * count > width:
        return torch.linalg.eigh(matrix)[1].flip(1)[:, :rank]
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        vectors, _, _ = torch.svd_lowrank(matrix, q=count, niter=ITERATIONS)
    return vectors[:, :rank]


def explained(gram: Gram) -> torch.Tensor:
    """(targets,) float64: variance of y explained by each additional rank of a fit."""
    full, _ = ridge(gram)
    seen = full @ gram.cross
    return torch.linalg.eigvalsh((seen + seen.T) / 2).flip(0).clamp(min=0)


def explained_in_all(gram: Gram) -> float:
    """Variance of y explained by a full-rank fit."""
    full, _ = ridge(gram)
    return float((full * gram.cross.T).sum())


@dataclass(frozen=True)
class Bottleneck:
    """The best rank-r form of some projections of x:
    ``W_i x + c_i = expand_i (reduce x + shift) + bias_i``.

    Attributes:
        reduce: (rank, inputs).
        shift: (rank,).
        expand: (rows, rank) of every projection.
        bias: (rows,) of every projection.
    """

    reduce: torch.Tensor
    shift: torch.Tensor
    expand: list[torch.Tensor]
    bias: list[torch.Tensor]

    def centred(self, mean: torch.Tensor) -> Bottleneck:
        """The same with the shift that takes inputs of a mean to a mean of zero."""
        shift = -(self.reduce @ mean)
        moved = shift - self.shift
        bias = [old - out @ moved for out, old in zip(self.expand, self.bias, strict=True)]
        return Bottleneck(self.reduce, shift, self.expand, bias)


class Projections:
    """Linear layers with the same input x, in the metric of x's covariance.

    Args:
        gram: Moments of x.
        weights: (rows, inputs) each; all count equally, whatever their scale.

    Attributes:
        mean: (inputs,) of x.
    """

    def __init__(self, gram: Gram, weights: list[torch.Tensor]):
        self.mean, self._root = gram.input_mean, gram.root
        self._weights = [weight.to(self.mean) for weight in weights]

    @cached_property
    def _metric(self) -> torch.Tensor:
        """(inputs, inputs) in whose leading eigenvectors most of the outputs' variance is; float32
        if wide, which is precise enough to find them."""
        root = self._root.float() if len(self._root) >= WIDE else self._root
        metric = torch.zeros_like(root)
        for weight in self._weights:
            seen = weight.to(root) @ root
            metric += seen.T @ seen / seen.square().sum().clamp(min=1e-30) / len(self._weights)
        return metric

    def residual_by_rank(self) -> torch.Tensor:
        """(inputs + 1,) float64: share of the outputs' variance lost at rank 0, 1, 2, ..."""
        values = torch.linalg.eigvalsh(self._metric).double().flip(0).clamp(min=0)
        total = values.sum().clamp(min=1e-30)
        kept = torch.cat([total.new_zeros(1), values.cumsum(0)]) / total
        return (1 - kept).clamp(min=0)

    def at_rank(self, rank: int, biases: list[torch.Tensor | None]) -> Bottleneck:
        """The best bottleneck of a rank; ``biases`` are the projections' own, (rows,) or None."""
        kept = leading(self._metric, rank).to(self._root)
        reduce = torch.linalg.solve_triangular(self._root.T, kept, upper=True).T
        expand = [weight @ (self._root @ kept) for weight in self._weights]
        shifts = [
            weight @ self.mean - out @ (reduce @ self.mean)
            for weight, out in zip(self._weights, expand, strict=True)
        ]
        bias = [
            shift if own is None else shift + own.to(shift)
            for shift, own in zip(shifts, biases, strict=True)
        ]
        return Bottleneck(reduce, reduce.new_zeros(rank), expand, bias)
