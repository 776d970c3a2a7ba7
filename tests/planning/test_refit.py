"""Fitted weights match their plan, are exact if possible, better than none and reproducible."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import specimens
import tiny
import torch
from torch import nn
from zoo import PROMPTS, Specimen

from yopo.data.prompts import Batch
from yopo.fitting import least_squares, refit
from yopo.fitting.layerwise import enter, real_rows
from yopo.fitting.least_squares import Moments
from yopo.fitting.pruned_batch import PrunedBatch, pruned_batches
from yopo.fitting.refit import neurons_and_map
from yopo.plans.checks import check_tensors
from yopo.plans.schema import LayerPlan, ModelShape, PruningPlan
from yopo.plans.storage import from_bytes, to_bytes
from yopo.plans.tensors import PlanTensors, refit_sizes
from yopo.runtime.install import pruned
from yopo.support.errors import DataError


def orders(shape: ModelShape, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(shape.ffn, generator=generator) for _ in range(shape.layers)]
    return torch.stack(rows)


def plan_of(
    specimen: Specimen, *layers: LayerPlan, order: torch.Tensor | None = None, **fixed: Any
) -> PruningPlan:
    """Make an unfitted plan that repeats the given layers, with a neuron order if any."""
    total = specimen.identity.shape.layers
    chosen = tuple(layers[index % len(layers)] for index in range(total))
    return tiny.random_plan(
        specimen.identity,
        random.Random(0),
        **({"layers": chosen, "compensation": "refit", "bidirectional": False} | fixed),
        baked=False,
        tensors=PlanTensors(order),
    )


def fit(
    model: nn.Module, batches: list[Batch], *plans: PruningPlan
) -> list[dict[int, dict[str, torch.Tensor]]]:
    return refit.refit(model, enter(model, batches), plans)


def fitted(model: nn.Module, batches: list[Batch], plan: PruningPlan) -> PruningPlan:
    """Return the plan with fitted weights."""
    (weights,) = fit(model, batches, plan)
    return replace(plan, tensors=replace(plan.tensors, refit=weights))


def everything(shape: ModelShape) -> LayerPlan:
    """Make a layer that uses every lever: some heads, fewer that attend, both fits."""
    heads = tuple(range(1, shape.heads))
    return LayerPlan(heads, heads[1:], 1, shape.ffn // 3, qkv_rank=shape.hidden // 2, map_rank=5)


@pytest.mark.parametrize("seed", range(4))
def test_a_fit_has_exactly_the_weights_of_its_plan(
    specimen: Specimen, batches: list[Batch], seed: int
) -> None:
    shape = specimen.identity.shape
    asked = specimen.plan(seed, compensation="refit", baked=False)
    plan = fitted(specimen.model, batches, replace(asked, tensors=PlanTensors(orders(shape, seed))))
    by_layer = plan.tensors.refit
    for index, layer in enumerate(plan.layers[: plan.visual_depth]):
        found = {name: tuple(each.shape) for name, each in by_layer.get(index, {}).items()}
        assert found == refit_sizes(layer, shape), index
    assert set(by_layer) <= set(range(plan.visual_depth))
    for weights in by_layer.values():
        for each in weights.values():
            assert each.dtype == torch.float32 and each.device.type == "cpu"
            assert torch.isfinite(each).all() and each.abs().max() > 0
    check_tensors(plan)
    again = from_bytes(to_bytes(plan.tensors))
    assert again == plan.tensors
    check_tensors(replace(plan, tensors=again))
    with pruned(specimen.model, plan):
        assert torch.isfinite(tiny.logits(specimen.model, batches[1].inputs)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fitted_weights_are_in_the_models_precision(
    specimen: Specimen, batches: list[Batch], dtype: torch.dtype
) -> None:
    model, shape = copy.deepcopy(specimen.model).to(dtype), specimen.identity.shape
    half = [Batch(tiny.as_dtype(each.inputs, dtype), None, ()) for each in batches]
    plan = fitted(model, half, plan_of(specimen, everything(shape), order=orders(shape)))
    for weights in plan.tensors.refit.values():
        assert {each.dtype for each in weights.values()} == {dtype}
        assert all(torch.isfinite(each).all() for each in weights.values())
    with pruned(model, plan, check=False):
        found = tiny.logits(model, half[0].inputs)
    assert found.dtype == dtype and torch.isfinite(found).all()


def test_random_plans_cover_every_fitted_weight(specimen: Specimen) -> None:
    """Guards the test above."""
    asked = set()
    for seed in range(4):
        plan = specimen.plan(seed, compensation="refit", baked=False)
        for layer in plan.layers[: plan.visual_depth]:
            asked |= set(refit_sizes(layer, plan.model.shape))
    assert {"reduce", "query", "key", "value", "output", "down", "map_in", "ffn_bias"} <= asked


def test_a_bottleneck_as_wide_as_the_model_is_the_dense_model(
    specimen: Specimen, batches: list[Batch]
) -> None:
    """In float64 the fit's rounding is far below the effect of a mistake."""
    shape = specimen.identity.shape
    every = tuple(range(shape.heads))
    oracle = specimen.oracle
    precise = [Batch(tiny.as_dtype(each.inputs, torch.float64), None, ()) for each in batches]
    wide = plan_of(specimen, LayerPlan(every, every, None, shape.ffn, qkv_rank=shape.hidden))
    plan = fitted(oracle, precise, wide)
    assert {each.dtype for each in plan.tensors.refit[0].values()} == {torch.float64}
    for batch in precise:
        dense, real = tiny.logits(oracle, batch.inputs), tiny.real(batch.inputs)
        with pruned(oracle, plan, check=False):
            found = tiny.logits(oracle, batch.inputs)
        torch.testing.assert_close(found[real], dense[real], rtol=1e-8, atol=1e-8)
    # The tolerance is meaningful: one dimension less is far outside it.
    narrow = replace(wide.layers[0], qkv_rank=shape.hidden // 2)
    less = fitted(oracle, precise, wide.with_layers((narrow,) * shape.layers))
    with pruned(oracle, less, check=False):
        found = tiny.logits(oracle, precise[0].inputs)
    assert (found - tiny.logits(oracle, precise[0].inputs)).abs().max() > 1e-3


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[PrunedBatch]:
    """The batches of the latest fit, in their final state."""
    seen: list[PrunedBatch] = []

    def split(*arguments: Any) -> list[PrunedBatch]:
        seen[:] = pruned_batches(*arguments)
        return seen

    monkeypatch.setattr(refit, "pruned_batches", split)
    return seen


@pytest.mark.parametrize("where", ["middle", "after"])
def test_a_fit_compensates_for_the_preceding_layers(
    specimen: Specimen, batches: list[Batch], carried: list[PrunedBatch], where: str
) -> None:
    """Least squares with a bias bring the mean of visual states to the dense one, whatever error
    the preceding layers made: the target starts from the pruned states."""
    shape = specimen.identity.shape
    total, heads = shape.layers, tuple(range(shape.heads))
    spoiled = LayerPlan(heads, (), None, 0)
    mended = LayerPlan(heads, heads[1:], None, 0)
    if where == "after":
        mended = LayerPlan(heads, (), None, shape.ffn // 3)
    plan = plan_of(specimen, *(spoiled,) * (total - 1), mended, order=orders(shape))
    fit(specimen.model, batches, plan)
    found = torch.cat([each.real(each.visual) for each in carried])
    dense = torch.cat(dense_ends(specimen, batches, where))
    torch.testing.assert_close(found.mean(dim=0), dense.mean(dim=0), rtol=1e-3, atol=1e-3)
    assert (found - dense).abs().max() > 0.1  # only the mean is exact


def test_a_cached_latent_is_centred_and_changes_nothing_else(
    specimen: Specimen, batches: list[Batch]
) -> None:
    shape = specimen.identity.shape
    plain = plan_of(specimen, everything(shape), order=orders(shape))
    layers = (replace(plain.layers[0], latent_bits=8), *plain.layers[1:])
    stored = replace(plain, layers=layers)
    streams = [each.layout.visual for each in enter(specimen.model, batches)]
    seen: list[torch.Tensor] = []
    for plan in (fitted(specimen.model, batches, plain), fitted(specimen.model, batches, stored)):
        with pruned(specimen.model, plan), torch.no_grad():
            part = specimen.model.get_decoder().yopo.visual[0]
            latents: list[torch.Tensor] = []
            handle = part.reduce.register_forward_hook(
                lambda *args, into=latents: into.append(args[2])
            )
            for batch in batches:
                specimen.model.base_model(**batch.inputs, use_cache=False)
            handle.remove()
            seen.append(torch.cat(list(map(real_rows, streams, latents))))
            keys = part.key(seen[-1]), part.value(seen[-1])
        if plan.layers == plain.layers:
            expected = keys
        else:
            for found, usual in zip(keys, expected, strict=True):
                torch.testing.assert_close(found, usual, rtol=1e-3, atol=1e-3)
    assert seen[0].mean(dim=0).abs().max() > 0.1 > seen[1].mean(dim=0).abs().max()


@pytest.mark.parametrize("latent_bits", [None, 8])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_fit_sees_what_the_runtime_computes(
    specimen: Specimen,
    batches: list[Batch],
    carried: list[PrunedBatch],
    bidirectional: bool,
    latent_bits: int | None,
) -> None:
    """Both streams match after the last layer of a plan with every lever, DeepStack included."""
    shape = specimen.identity.shape
    frozen = LayerPlan(tuple(range(shape.heads)), (), None, 0, map_rank=4)
    layers = (replace(everything(shape), latent_bits=latent_bits), frozen)
    asked = plan_of(specimen, *layers, order=orders(shape), bidirectional=bidirectional)
    plan = fitted(specimen.model, batches, asked)
    decoder = specimen.model.get_decoder()
    for batch, found in zip(batches, carried, strict=True):
        layout = found.dense.layout
        with pruned(specimen.model, plan), torch.no_grad():
            states = specimen.model.base_model(**batch.inputs, use_cache=False).last_hidden_state
            visual, text = decoder.norm(found.real(found.visual)), decoder.norm(found.text)
        expected = found.real(layout.visual.gather(states))
        assert len(expected) > 5 and expected.abs().max() > 0.1
        torch.testing.assert_close(visual, expected, rtol=1e-3, atol=1e-4)
        mask = layout.text.gather(batch.inputs["attention_mask"][..., None])[..., 0].bool()
        if layout.text.mask is not None:
            mask &= layout.text.mask
        torch.testing.assert_close(
            text[mask], layout.text.gather(states)[mask], rtol=1e-3, atol=1e-4
        )


def visual_error(dense: list[torch.Tensor], found: list[PrunedBatch]) -> float:
    """Return the squared error of final visual states."""
    pairs = zip(dense, found, strict=True)
    return sum(float((each.real(each.visual) - truth).square().sum()) for truth, each in pairs)


def test_a_refit_brings_visual_states_closer_to_the_dense_ones(
    specimen: Specimen, batches: list[Batch], carried: list[PrunedBatch]
) -> None:
    shape = specimen.identity.shape
    heads = tuple(range(shape.heads))
    partly = LayerPlan(heads, heads[1:], None, shape.ffn // 2)
    errors = []
    for layers, compensation in (
        ((partly,), "none"),
        ((partly,), "refit"),
        ((replace(partly, map_rank=8),), "refit"),
    ):
        plan = plan_of(specimen, *layers, order=orders(shape), compensation=compensation)
        if compensation == "refit":
            fit(specimen.model, batches, plan)
            errors.append(visual_error(dense_ends(specimen, batches), carried))
        else:
            errors.append(unfitted_error(specimen, batches, plan))
    assert errors[1] < 0.7 * errors[0] and errors[2] < errors[1], errors


def dense_ends(
    specimen: Specimen, batches: list[Batch], where: str = "after"
) -> list[torch.Tensor]:
    """Return the dense model's visual states in or after its last layer."""
    walk = refit.DenseWalk(specimen.model, enter(specimen.model, batches))
    for number in range(specimen.identity.shape.layers):
        states = [getattr(each, where) for each in walk.step(number)]
    return states


def unfitted_error(specimen: Specimen, batches: list[Batch], plan: PruningPlan) -> float:
    """Return the error of visual states before the final norm, without compensation."""
    total, masks = 0.0, []
    walk = refit.DenseWalk(specimen.model, enter(specimen.model, batches))
    masks = [batch.layout for batch in walk.batches]
    decoder = specimen.model.get_decoder()
    for batch, layout, truth in zip(batches, masks, dense_ends(specimen, batches), strict=True):
        given: list[torch.Tensor] = []
        handle = decoder.norm.register_forward_pre_hook(
            lambda module, args, given=given: given.append(args[0])
        )
        try:
            with pruned(specimen.model, plan), torch.no_grad():
                specimen.model.base_model(**batch.inputs, use_cache=False)
        finally:
            handle.remove()
        visual = given[1] if layout.visual.mask is None else given[1][layout.visual.mask]
        total += float((visual.reshape(truth.shape) - truth).square().sum())
    return total


def test_two_fits_give_the_same_bytes(specimen: Specimen, batches: list[Batch]) -> None:
    shape = specimen.identity.shape
    plan = plan_of(specimen, everything(shape), order=orders(shape))
    first, again = (to_bytes(fitted(specimen.model, batches, plan).tensors) for _ in range(2))
    assert first == again


def test_data_without_any_image_is_refused(specimen: Specimen) -> None:
    inputs = specimen.inputs(PROMPTS["text"])
    plan = plan_of(specimen, everything(specimen.identity.shape))
    with pytest.raises(DataError, match="No calibration pair holds an image"):
        fit(specimen.model, [Batch(inputs, None, (None, None))], plan)


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "DAMPING", 1e-10)
    monkeypatch.setattr(least_squares, "FLOOR", 0.0)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_neurons_and_map_recover_a_target_they_can_express(undamped: None, rank: int) -> None:
    """A down projection plus an affine map of rank 3 is recovered from rank 3 on."""
    generator = torch.Generator().manual_seed(0)
    neurons, inputs = (torch.randn(400, width, generator=generator) for width in (5, 7))
    own, left, right = (
        torch.randn(*size, generator=generator) for size in ((6, 5), (6, 3), (3, 7))
    )
    target = neurons @ own.T + inputs @ right.T @ left.T + 3
    moments = Moments(12, 6)
    moments.add(torch.cat([neurons, inputs], dim=1), target)
    weights = neurons_and_map(moments.gram(), own, rank)
    assert weights["map_in"].shape == (rank, 7) and weights["map_out"].shape == (6, rank)
    through = inputs.double() @ weights["map_in"].T @ weights["map_out"].T
    found = neurons.double() @ weights["down"].T + through + weights["ffn_bias"]
    off = (found - target).abs().max().item()
    assert off < 1e-3 if rank >= 3 else off > 0.1
    if rank >= 3:
        both = weights["map_out"] @ weights["map_in"]
        torch.testing.assert_close(both, (left @ right).double(), rtol=0, atol=1e-3)


def test_without_a_map_the_down_projection_is_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, target = (torch.randn(60, width, generator=generator) for width in (9, 4))
    own = torch.randn(4, 5, generator=generator)
    moments = Moments(9, 4)
    moments.add(inputs, target)
    weights = neurons_and_map(moments.gram(), own, 0)
    assert sorted(weights) == ["down", "ffn_bias"]
    alone = Moments(5, 4)
    alone.add(inputs[:, :5], target)
    weight, bias = least_squares.ridge(alone.gram(), own)
    torch.testing.assert_close(weights["down"], weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights["ffn_bias"], bias, rtol=1e-4, atol=1e-4)


class Affine(nn.Module):
    """Replaces an FFN by a linear map of rank 2; keeps the real one's parts."""

    def __init__(self, mlp: nn.Module, hidden: int):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.__dict__["_real"] = mlp
        self.out = torch.randn(hidden, 2, generator=generator)
        self.inner = torch.randn(2, hidden, generator=generator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        return normed @ self.inner.T @ self.out.T + 0.5


@pytest.mark.parametrize("rank", [1, 2])
def test_a_map_recovers_an_affine_ffn(
    specimen: Specimen, carried: list[PrunedBatch], undamped: None, rank: int
) -> None:
    shape, last = specimen.identity.shape, specimen.identity.shape.layers - 1
    prompts = [PROMPTS["padded, different images"]] * 6
    batches = specimens.make_batches(specimen, prompts)
    full = LayerPlan(tuple(range(shape.heads)), tuple(range(shape.heads)), None, shape.ffn)
    layers = (*(full,) * last, replace(full, neurons=0, map_rank=rank))
    plan = plan_of(specimen, *layers)
    layer = specimen.model.get_decoder().layers[last]
    mlp = layer.mlp
    layer.mlp = Affine(mlp, shape.hidden)
    try:
        fit(specimen.model, batches, plan)
        truth = dense_ends(specimen, batches)
    finally:
        layer.mlp = mlp
    error = visual_error(truth, carried) / sum(float(each.square().sum()) for each in truth)
    assert error < 1e-6 if rank == 2 else error > 1e-3, error


def test_plans_fitted_together_are_what_they_are_alone(
    specimen: Specimen, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One walk, and what two plans share is solved once; the weights are the same bits."""
    shape = specimen.identity.shape
    full, other = everything(shape), LayerPlan((0,), (), None, shape.ffn // 2)
    order = orders(shape)
    plans = [
        plan_of(specimen, full, order=order),
        plan_of(specimen, full, other, order=order),
        plan_of(specimen, other, full, order=order),
    ]
    plans[0] = replace(plans[0], layers=(full, *(other,) * (shape.layers - 1)))
    alone = [fit(specimen.model, batches, plan)[0] for plan in plans]
    steps, runs = [], []
    step, run = refit.DenseWalk.step, refit.LayerFit.run
    monkeypatch.setattr(
        refit.DenseWalk, "step", lambda walk, number: steps.append(number) or step(walk, number)
    )
    monkeypatch.setattr(
        refit.LayerFit, "run", lambda self, *rest: runs.append(self.number) or run(self, *rest)
    )
    shared = [replace(plan, tensors=plans[0].tensors) for plan in plans]
    together = fit(specimen.model, batches, *shared)
    assert steps == list(range(shape.layers))
    assert runs.count(0) == 2 and runs.count(1) == 2
    for found, expected in zip(together, alone, strict=True):
        assert found.keys() == expected.keys()
        for number, weights in expected.items():
            assert weights.keys() == found[number].keys()
            assert all(torch.equal(found[number][name], each) for name, each in weights.items())


def test_plans_with_different_orders_share_no_walk(
    specimen: Specimen, batches: list[Batch]
) -> None:
    layer = everything(specimen.identity.shape)
    plans = [plan_of(specimen, layer, order=orders(specimen.identity.shape)) for _ in range(2)]
    with pytest.raises(ValueError, match="cannot share a walk"):
        fit(specimen.model, batches, *plans)
