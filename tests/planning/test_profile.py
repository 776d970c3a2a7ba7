"""Energies of prunable work are zero if there is none, and otherwise match brute force."""

from __future__ import annotations

from typing import Any

import pytest
import specimens
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from zoo import PROMPTS, Row, Specimen

from yopo.data.prompts import Batch
from yopo.fitting import least_squares
from yopo.fitting.layerwise import enter
from yopo.fitting.profile import Profile, profile

MANY: list[list[Row]] = [PROMPTS["padded, different images"]] * 12
"""More visual tokens than the hidden width, else everything is an affine function of anything."""


@pytest.fixture(scope="module")
def many(specimen: Specimen) -> list[Batch]:
    return specimens.make_batches(specimen, MANY)


@pytest.fixture(scope="module")
def found(specimen: Specimen, many: list[Batch]) -> Profile:
    return profile(specimen.model, enter(specimen.model, many), specimen.identity.shape)


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "DAMPING", 1e-9)
    monkeypatch.setattr(least_squares, "FLOOR", 0.0)


@torch.no_grad()
def states(specimen: Specimen, batches: list[Batch]) -> dict[str, list[torch.Tensor]]:
    """Record visual states by hooks on a stock forward, (tokens, width) per layer, float64.

    Returns:
        ``before`` and ``after`` each layer, ``normed`` before attention and ``fed`` before
        the FFN, ``ffn`` its output.
    """
    names = specimen.family.backbone(specimen.model.config)
    taken: dict[str, list[list[torch.Tensor]]] = {}
    handles = []
    total = specimen.identity.shape.layers

    def note(name: str, number: int, module: nn.Module, *, output: bool) -> None:
        rows = taken.setdefault(name, [[] for _ in range(total)])[number]
        if output:
            handles.append(module.register_forward_hook(lambda _, args, out: rows.append(out)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, args: rows.append(args[0])))

    for number, layer in enumerate(specimen.model.get_decoder().layers):
        note("before", number, layer, output=False)
        note("after", number, layer, output=True)
        note("normed", number, getattr(layer, names.attention_norm), output=True)
        note("fed", number, getattr(layer, names.ffn_norm), output=True)
        note("ffn", number, layer.mlp, output=True)
    masks = []
    try:
        for batch in batches:
            specimen.model.base_model(**batch.inputs, use_cache=False)
            placeholders = torch.tensor(specimen.entry.placeholders)
            masks.append(torch.isin(batch.inputs["input_ids"], placeholders))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: [
            torch.cat([rows[mask] for rows, mask in zip(layer, masks, strict=True)]).double()
            for layer in layers
        ]
        for name, layers in taken.items()
    }


def residual(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the mean squared error of the best affine map from x to y."""
    ones = torch.cat([x, torch.ones(len(x), 1).to(x)], dim=1)
    best = torch.linalg.lstsq(ones, y, driver="gelsd").solution
    return (y - ones @ best).square().sum(dim=1).mean().item()


def test_shapes_and_signs(specimen: Specimen, found: Profile) -> None:
    shape = specimen.identity.shape
    assert found.mixing.shape == (shape.layers, shape.heads)
    assert found.stream.shape == (shape.layers + 1,)
    by_rank = (shape.layers, shape.hidden + 1)
    assert found.bottleneck_residual.shape == found.map_residual.shape == by_rank
    assert found.nonlinear_residual.shape == (shape.layers,)
    for name, values in vars(found).items():
        assert values.dtype == torch.float64 and torch.isfinite(values).all(), name
        assert (values >= 0).all(), name
    assert found.mixing.min() > 1e-6  # real heads mix, FFNs are not linear
    assert found.nonlinear_residual.min() > 1e-6


def energy(states: torch.Tensor) -> float:
    """Return the geometric mean of squared norms."""
    return states.square().sum(dim=1).log().mean().exp().item()


def test_energies_are_relative_to_the_residual_stream_after_the_layer(
    specimen: Specimen, many: list[Batch], found: Profile
) -> None:
    truth = states(specimen, many)

    def stacked(number: int) -> torch.Tensor:  # what the next layer gets: DeepStack adds to it
        return [*truth["before"][1:], truth["after"][-1]][number]

    for number in range(specimen.identity.shape.layers):
        before, after = truth["before"][number], truth["after"][number]
        update = after - before
        assert found.stream[number].item() == pytest.approx(energy(before), rel=1e-4)
        assert found.stream[number + 1].item() == pytest.approx(energy(stacked(number)), rel=1e-4)
        spread = (update - update.mean(dim=0)).square().sum(dim=1).mean() / energy(stacked(number))
        assert found.map_residual[number, 0].item() == pytest.approx(spread.item(), rel=1e-4)


def test_the_unexplained_part_matches_least_squares(
    specimen: Specimen, many: list[Batch], found: Profile
) -> None:
    """Damping makes it an upper bound, too large by at most one percent of the update."""
    truth = states(specimen, many)
    for number in range(specimen.identity.shape.layers):
        before, normed = truth["before"][number], truth["normed"][number]
        scale = found.stream[number + 1].item()
        left = residual(normed, truth["after"][number] - before) / scale
        nonlinear = residual(truth["fed"][number], truth["ffn"][number]) / scale
        whole = found.map_residual[number, 0].item()
        feeds = truth["ffn"][number].square().sum(dim=1).mean().item() / scale
        assert left - 1e-5 * whole <= found.map_residual[number, -1].item() <= left + 0.02 * whole
        own = found.nonlinear_residual[number].item()
        assert nonlinear - 1e-5 * feeds <= own <= nonlinear + 0.02 * feeds
    assert (found.map_residual.diff(dim=1) <= 0).all()


def test_bottleneck_residuals_match_the_stacked_projections(
    specimen: Specimen, many: list[Batch], found: Profile
) -> None:
    """They follow from singular values of W_i root over their norms, in any module layout."""
    shape, truth = specimen.identity.shape, states(specimen, many)
    names = specimen.family.backbone(specimen.model.config)
    widths = [shape.heads * shape.head_dim, *(shape.kv_heads * shape.head_dim,) * 2]
    for number, layer in enumerate(specimen.model.get_decoder().layers):
        modules = dict.fromkeys(
            getattr(layer.self_attn, getattr(names, name)) for name in ("query", "key", "value")
        )
        rows = torch.cat([module.weight for module in modules]).detach().double()
        normed = truth["normed"][number]
        covariance = (normed - normed.mean(dim=0)).T @ (normed - normed.mean(dim=0)) / len(normed)
        ridge = 1e-3 * covariance.diagonal().mean() + 1e-9 * normed.mean(dim=0).square().mean()
        root = torch.linalg.cholesky(covariance + ridge * torch.eye(shape.hidden).double())
        seen = [weight @ root for weight in rows.split(widths)]
        stacked = torch.cat([each / each.norm() for each in seen])
        values = torch.linalg.svdvals(stacked).square()
        kept = torch.cat([torch.zeros(1).double(), values.cumsum(0)]) / values.sum()
        torch.testing.assert_close(
            found.bottleneck_residual[number], (1 - kept).clamp(min=0), rtol=1e-4, atol=1e-6
        )


def own_value_in(heads: list[int]) -> str:
    """Register an attention in which some heads give every token its own value; return its name."""

    def attend(module, query, key, value, mask, **options: Any) -> tuple[torch.Tensor, None]:
        mixed, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        own = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)
        mixed = mixed.clone()
        mixed[:, :, heads] = own[:, :, heads]
        return mixed, None

    AttentionInterface.register("sdpa_own_value", attend)
    return "sdpa_own_value"


def test_a_head_that_sees_only_its_own_token_mixes_nothing(
    specimen: Specimen, many: list[Batch], undamped: None
) -> None:
    shape = specimen.identity.shape
    usual = profile(specimen.model, enter(specimen.model, many), shape).mixing
    alone = [0, shape.heads - 1]
    config = specimen.model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = own_value_in(alone)
    try:
        found = profile(specimen.model, enter(specimen.model, many), shape).mixing
    finally:
        config._attn_implementation = before
    others = [head for head in range(shape.heads) if head not in alone]
    assert (found[:, alone] < 1e-6 * usual[:, alone]).all()
    assert found[:, others].min() > 1e-6 and usual.min() > 1e-6


def test_a_head_without_values_mixes_nothing(specimen: Specimen, many: list[Batch]) -> None:
    """Whatever it attends to, it gathers a constant, its value's bias."""
    shape = specimen.identity.shape
    names = specimen.family.backbone(specimen.model.config)
    attention = specimen.model.get_decoder().layers[1].self_attn
    rows = slice(-shape.head_dim, None)  # the last KV head's, fused or not
    weight = getattr(attention, names.value).weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[rows] = 0
    try:
        found = profile(specimen.model, enter(specimen.model, many), shape).mixing
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    group = range(shape.heads - shape.group, shape.heads)
    assert found[1, list(group)].max() < 1e-10
    assert found[1, : shape.heads - shape.group].min() > 1e-6 and found[0].min() > 1e-6


def test_repeated_or_reordered_data_gives_the_same_profile(
    specimen: Specimen, many: list[Batch], found: Profile
) -> None:
    again = profile(
        specimen.model, enter(specimen.model, [*many[::-1], *many]), specimen.identity.shape
    )
    for name, values in vars(found).items():
        torch.testing.assert_close(getattr(again, name), values, rtol=1e-3, atol=1e-6, msg=name)


def test_profiling_leaves_the_model_as_it_was(specimen: Specimen, many: list[Batch]) -> None:
    decoder = specimen.model.get_decoder()
    hooks = sum(len(module._forward_pre_hooks) for module in decoder.modules())
    profile(specimen.model, enter(specimen.model, many[:1]), specimen.identity.shape)
    assert sum(len(module._forward_pre_hooks) for module in decoder.modules()) == hooks
