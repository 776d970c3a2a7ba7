"""Fits from sums equal fits from rows: normal equations, reduced rank, bottlenecks; never NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yopo.fitting import least_squares
from yopo.fitting.least_squares import (
    Gram,
    Moments,
    Projections,
    explained,
    explained_in_all,
    leading,
    low_rank,
    reduced_rank,
    ridge,
)

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5), st.integers(0, 999))
"""Rows, inputs, targets, seed."""


def draw(rows: int, inputs: int, targets: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw correlated inputs with a mean and targets that partly depend on them; float32 values."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator) @ mixing
    x = x + torch.randn(inputs, generator=generator)
    y = x @ torch.randn(inputs, targets, generator=generator)
    return x, y + torch.randn(rows, targets, generator=generator) + 2


def gram_of(x: torch.Tensor, y: torch.Tensor | None = None) -> Gram:
    moments = Moments(x.shape[1], 0 if y is None else y.shape[1])
    moments.add(x, y)
    return moments.gram()


def centred(x: torch.Tensor) -> torch.Tensor:
    return x.double() - x.double().mean(dim=0)


def damping_of(gram: Gram) -> float:
    """Compute the ridge term by its definition."""
    diagonal = gram.covariance.diagonal().mean().item()
    return 1e-3 * diagonal + 1e-9 * gram.input_mean.square().mean().item() + 1e-30


def error(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
    """Return the mean squared error of ``weight x + bias``, summed over targets."""
    rest = y.double() - x.double() @ weight.T - bias
    return rest.square().sum(dim=1).mean().item()


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes fits exact if the covariance is well conditioned."""
    monkeypatch.setattr(least_squares, "DAMPING", 1e-13)
    monkeypatch.setattr(least_squares, "FLOOR", 0.0)


@given(sizes=SIZES, cut=st.floats(0, 1))
def test_sums_in_pieces_are_the_rows_at_once(sizes: tuple[int, ...], cut: float) -> None:
    x, y = draw(*sizes)
    moments, border = Moments(x.shape[1], y.shape[1]), max(1, round(cut * len(x)))
    moments.add(x[:border], y[:border])
    for row in range(border, len(x)):
        moments.add(x[row : row + 1], y[row : row + 1])
    assert moments.count == len(x)
    gram, rows = moments.gram(), len(x)
    expected = {
        "covariance": centred(x).T @ centred(x) / rows,
        "cross": centred(x).T @ centred(y) / rows,
        "input_mean": x.double().mean(dim=0),
        "target_mean": y.double().mean(dim=0),
    }
    scale = max(x.abs().max().item(), y.abs().max().item())
    for name, value in expected.items():
        found = getattr(gram, name)
        assert found.dtype == torch.float64, name
        torch.testing.assert_close(found, value, rtol=1e-5, atol=2e-6 * max(1, scale) ** 2)
    alone = gram_of(x)
    torch.testing.assert_close(alone.covariance, gram.covariance, rtol=1e-5, atol=1e-5 * scale**2)
    assert alone.cross.shape == (x.shape[1], 0)


def test_small_variances_survive_large_means() -> None:
    """Massive activations have means a thousand times their deviations; products are float32."""
    x, y = draw(400, 5, 3, 1)
    far_x, far_y = x + 3000, y - 5000
    exact = centred(far_x).T @ centred(far_x) / len(x)
    gram = gram_of(far_x, far_y)
    torch.testing.assert_close(gram.covariance, exact, rtol=1e-4, atol=1e-4)
    weight, bias = ridge(gram)
    usual, shift = ridge(gram_of(x, y))
    assert error(far_x, far_y, weight, bias) < 1.02 * error(x, y, usual, shift)


@given(sizes=SIZES)
def test_a_fit_may_use_only_the_first_inputs(sizes: tuple[int, ...]) -> None:
    x, y = draw(*sizes)
    count = max(1, x.shape[1] - 1)
    whole, part = gram_of(x, y).first(count), gram_of(x[:, :count], y)
    for name in ("covariance", "cross", "input_mean", "target_mean"):
        torch.testing.assert_close(
            getattr(whole, name), getattr(part, name), rtol=1e-6, atol=1e-4, msg=name
        )


@given(seed=st.integers(0, 999))
def test_without_subtracts_a_fit_from_the_targets(seed: int) -> None:
    x, y = draw(60, 6, 3, seed)
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
    found = gram_of(x, y).without(4, weight.double())
    rest = gram_of(x[:, :4], y - x[:, 4:] @ weight.T)
    for name in ("covariance", "cross", "input_mean", "target_mean"):
        torch.testing.assert_close(
            getattr(found, name), getattr(rest, name), rtol=1e-5, atol=1e-3, msg=name
        )


@given(sizes=SIZES, has_weight=st.booleans())
def test_ridge_solves_the_damped_normal_equations(sizes: tuple[int, ...], has_weight: bool) -> None:
    """min |Y - X W^T|^2 / n + damping |W - toward|^2 holds for one row and for many."""
    x, y = draw(*sizes)
    gram = gram_of(x, y)
    toward = None
    if has_weight:
        toward = torch.randn(y.shape[1], x.shape[1], generator=torch.Generator().manual_seed(1))
    weight, bias = ridge(gram, toward)
    damping = damping_of(gram)
    pull = torch.zeros_like(weight) if toward is None else toward.double()
    left = weight @ gram.covariance + damping * weight
    scale = 1 + gram.covariance.abs().max().item()
    torch.testing.assert_close(left, gram.cross.T + damping * pull, rtol=1e-5, atol=1e-6 * scale)
    assert torch.allclose(weight @ gram.input_mean + bias, gram.target_mean)  # means agree


def test_ridge_without_damping_is_least_squares(undamped: None) -> None:
    y = draw(200, 6, 4, 3)[1]
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(4)) + 1
    weight, bias = ridge(gram_of(x, y))
    ones = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    best = torch.linalg.lstsq(ones, y.double()).solution
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), best.T, atol=1e-4, rtol=0)


DEGENERATE = {
    "all zero": lambda x: torch.zeros_like(x),
    "constant": lambda x: torch.full_like(x, 0.1),
    "constant and far away": lambda x: torch.full_like(x, 12345.678),
    "one dead input": lambda x: torch.cat([x[:, :-1], torch.zeros_like(x[:, :1])], dim=1),
    "one constant input": lambda x: torch.cat([x[:, :-1], torch.full_like(x[:, :1], 7.7)], dim=1),
    "duplicated inputs": lambda x: x[:, :1].expand_as(x).contiguous(),
    "a single row": lambda x: x[:1],
    "fewer rows than inputs": lambda x: x[:3],
    "tiny": lambda x: 1e-12 * x,
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("pieces", [1, 7])
def test_degenerate_inputs_give_finite_fits(name: str, pieces: int) -> None:
    x, y = draw(50, 5, 3, 4)
    x = DEGENERATE[name](x)
    y = y[: len(x)]
    moments = Moments(5, 3)
    for rows, wanted in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        moments.add(rows, wanted)
    gram = moments.gram()
    own = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    weight, bias = ridge(gram, own)
    out, inner, shift = reduced_rank(gram, 2)
    bottleneck = Projections(gram, [own]).at_rank(2, [None])
    found = (weight, bias, out, inner, shift, bottleneck.reduce, *bottleneck.expand)
    residual = Projections(gram, [own]).residual_by_rank()
    for each in (*found, *bottleneck.bias, explained(gram), residual):
        assert torch.isfinite(each).all()
    # However small the variance, a fit is at worst about as good as the best constant.
    constant = centred(y).square().sum(dim=1).mean().item()
    assert error(x, y, weight, bias) <= constant * 1.01 + 1e-6
    through = x.double() @ bottleneck.reduce.T @ bottleneck.expand[0].T + bottleneck.bias[0]
    if name.startswith(("all", "constant", "a single", "duplicated", "tiny")):
        torch.testing.assert_close(through, x.double() @ own.double().T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
def test_a_constant_input_keeps_its_weight(value: float) -> None:
    x, y = torch.full((64, 4), value), draw(64, 4, 3, 5)[1]
    own = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).double()
    weight, bias = ridge(gram_of(x, y), own)
    torch.testing.assert_close(weight, own, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(x[0].double() @ weight.T + bias, y.double().mean(dim=0))
    nothing, mean = ridge(gram_of(x, y))
    assert nothing.abs().max() < 1e-3
    torch.testing.assert_close(x[0].double() @ nothing.T + mean, y.double().mean(dim=0))


def test_a_dead_input_among_live_ones_keeps_its_weight() -> None:
    x, y = draw(300, 5, 3, 6)
    x[:, 2] = 0
    own = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).double()
    weight, _ = ridge(gram_of(x, y), own)
    torch.testing.assert_close(weight[:, 2], own[:, 2])
    assert (weight - own).abs()[:, [0, 1, 3, 4]].max() > 0.1


@given(seed=st.integers(0, 999))
def test_reduced_rank_at_full_rank_is_ridge_and_its_error_falls(seed: int) -> None:
    x, y = draw(80, 6, 4, seed)
    gram = gram_of(x, y)
    weight, bias = ridge(gram)
    out, inner, shift = reduced_rank(gram, 4)
    torch.testing.assert_close(out @ inner, weight)
    torch.testing.assert_close(shift, bias)
    errors = []
    for rank in range(5):
        out, inner, shift = reduced_rank(gram, rank)
        assert out.shape == (4, rank) and inner.shape == (rank, 6)
        errors.append(error(x, y, out @ inner, shift))
    # The loss from damping is bounded by the ridge term.
    slack = damping_of(gram) * weight.square().sum().item()
    assert all(one >= other - slack for one, other in zip(errors, errors[1:], strict=False))
    assert errors[0] == pytest.approx(centred(y).square().sum(dim=1).mean().item(), rel=1e-5)
    for rank in range(5):  # a truncation that does not know the covariance does no better
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        cut = (u[:, :rank] * s[:rank]) @ v[:rank]
        best = error(x, y, cut, gram.target_mean - cut @ gram.input_mean)
        assert errors[rank] <= best + slack + 1e-6 * errors[0]


def test_knowing_the_covariance_helps() -> None:
    """The strict form of the above, in a case where plain truncation keeps the wrong part."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.01, 0.01, 5.0, 5.0])
    x = torch.randn(500, 4, generator=generator) * scales
    weight = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0]))
    y = x @ weight.T
    gram = gram_of(x, y)
    out, inner, shift = reduced_rank(gram, 2)
    u, s, v = torch.linalg.svd(weight.double())
    cut = (u[:, :2] * s[:2]) @ v[:2]
    plain = error(x, y, cut, gram.target_mean - cut @ gram.input_mean)
    assert error(x, y, out @ inner, shift) < 1e-3 * plain


@given(seed=st.integers(0, 999))
def test_explained_gives_the_share_of_each_rank(seed: int) -> None:
    x, y = draw(80, 6, 4, seed)
    gram = gram_of(x, y)
    parts = explained(gram)
    assert parts.shape == (4,) and (parts.diff() <= 0).all()
    total = centred(y).square().sum(dim=1).mean().item()
    slack = damping_of(gram) * ridge(gram)[0].square().sum().item()
    for rank in range(5):
        out, inner, shift = reduced_rank(gram, rank)
        left = error(x, y, out @ inner, shift)
        # Damped, so an estimate from below, off by no more than the damping.
        assert -1e-5 * total <= total - left - parts[:rank].sum().item() <= slack + 1e-5 * total


def test_explained_sums_to_the_explained_variance(undamped: None) -> None:
    x, y = draw(300, 6, 4, 1)
    ones = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    fitted = ones @ torch.linalg.lstsq(ones, y.double()).solution
    expected = centred(fitted).square().sum(dim=1).mean()
    torch.testing.assert_close(explained(gram_of(x, y)).sum(), expected, rtol=1e-5, atol=0)
    assert explained_in_all(gram_of(x, y)) == pytest.approx(float(expected), rel=1e-5)


def test_low_rank_is_the_best_one_in_its_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    root = torch.randn(7, 7, generator=generator, dtype=torch.float64).tril()
    out, inner = low_rank(weight, root, 2)
    left = ((weight - out @ inner) @ root).square().sum()
    torch.testing.assert_close(left, torch.linalg.svdvals(weight @ root)[2:].square().sum())


def projections(seed: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    x, _ = draw(120, 6, 1, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = [torch.randn(rows, 6, generator=generator) for rows in (8, 4, 2)]
    return x, weights, [torch.randn(8, generator=generator), None, torch.ones(2)]


@given(seed=st.integers(0, 999))
def test_a_bottleneck_of_full_rank_changes_nothing(seed: int) -> None:
    x, weights, biases = projections(seed)
    best = Projections(gram_of(x), weights).at_rank(6, biases)
    assert best.reduce.shape == (6, 6)
    for weight, own, expand, bias in zip(weights, biases, best.expand, best.bias, strict=True):
        found = x.double() @ best.reduce.T @ expand.T + bias
        expected = x.double() @ weight.double().T + (0 if own is None else own.double())
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@given(seed=st.integers(0, 999))
def test_residuals_fall_from_one_to_zero(seed: int) -> None:
    x, weights, _ = projections(seed)
    found = Projections(gram_of(x), weights).residual_by_rank()
    assert found.shape == (7,) and found[0] == 1 and found[-1] < 1e-12
    assert (found.diff() <= 0).all()
    scaled = [100 * weights[0], weights[1], 1e-3 * weights[2]]  # every projection counts the same
    torch.testing.assert_close(Projections(gram_of(x), scaled).residual_by_rank(), found)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_residual_equals_the_measured_error(undamped: None, rank: int) -> None:
    x, weights, biases = projections(7)
    found = Projections(gram_of(x), weights[:1])
    best = found.at_rank(rank, biases[:1])
    full = x.double() @ weights[0].double().T + biases[0]
    off = x.double() @ best.reduce.T @ best.expand[0].T + best.bias[0] - full
    assert off.mean(dim=0).abs().max() < 1e-5  # means are kept
    measured = off.square().sum() / centred(full).square().sum()
    assert found.residual_by_rank()[rank] == pytest.approx(measured.item(), rel=1e-4)


def test_all_projections_share_the_residual(undamped: None) -> None:
    x, weights, biases = projections(9)
    found = Projections(gram_of(x), weights)
    best = found.at_rank(3, biases)
    residuals = []
    for weight, own, expand, bias in zip(weights, biases, best.expand, best.bias, strict=True):
        full = x.double() @ weight.double().T + (0 if own is None else own)
        off = x.double() @ best.reduce.T @ expand.T + bias - full
        residuals.append((off.square().sum() / centred(full).square().sum()).item())
    assert found.residual_by_rank()[3] == pytest.approx(sum(residuals) / 3, rel=1e-4)


def spectra(width: int) -> dict[str, torch.Tensor]:
    """Falling eigenvalues: hardly, slowly, and quickly."""
    rank = torch.arange(1, width + 1, dtype=torch.float64)
    flat = torch.rand(width, generator=torch.Generator().manual_seed(1)).double()
    return {"flat": flat.sort(descending=True).values, "root": rank**-0.5, "fast": rank**-2.0}


@pytest.mark.parametrize("name", spectra(1))
@pytest.mark.parametrize("rank", [8, 64, 128])
def test_iterated_vectors_lose_hardly_more_than_the_best(
    name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "WIDE", 512)
    values = spectra(512)[name]
    generator = torch.Generator().manual_seed(2)
    basis, _ = torch.linalg.qr(torch.randn(512, 512, generator=generator, dtype=torch.float64))
    matrix, before = (basis * values) @ basis.T, torch.get_rng_state()
    found = leading(matrix, rank)
    assert torch.equal(before, torch.get_rng_state())  # whoever drew numbers goes on as before
    assert torch.equal(found, leading(matrix, rank))
    torch.testing.assert_close(found.T @ found, torch.eye(rank).double())
    lost = values.sum() - (found * (matrix @ found)).sum()
    assert 1 - 1e-12 <= lost / values[rank:].sum() < 1.007


def test_a_wide_bottleneck_is_almost_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = draw(600, 192, 1, 3)
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(96, 192, generator=generator) for _ in range(3)]

    def error() -> float:
        found = Projections(gram_of(x), weights).at_rank(24, [None] * 3)
        off = [
            (x.double() @ (out @ found.reduce - weight.double()).T + bias).square().sum()
            for weight, out, bias in zip(weights, found.expand, found.bias, strict=True)
        ]
        return float(sum(off))

    exact, residual = error(), Projections(gram_of(x), weights).residual_by_rank()
    monkeypatch.setattr(least_squares, "WIDE", 64)
    assert exact != error() <= 1.01 * exact
    wide = Projections(gram_of(x), weights).residual_by_rank()
    torch.testing.assert_close(wide, residual, rtol=0, atol=1e-5)
