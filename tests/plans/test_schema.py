"""A plan validates itself and derives properties from its layers."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yopo.plans.checks import check_tensors
from yopo.plans.grid import Grid
from yopo.plans.schema import (
    Budget,
    InvalidPlan,
    LayerPlan,
    ModelIdentity,
    ModelShape,
    PruningPlan,
    Workload,
    full_layer,
    full_plan,
)
from yopo.plans.tensors import PlanTensors
from yopo.support.errors import PlanError

SHAPE = ModelShape(layers=3, hidden=60, heads=6, kv_heads=2, head_dim=16, ffn=50)
IDENTITY = ModelIdentity("some", "llava", SHAPE, "0" * 64)
WORKLOAD = Workload((Grid(3, 5), Grid(2, 2)), text=10, text_before=3)
WHOLE = full_plan(IDENTITY, WORKLOAD)
NONE = LayerPlan((), attend_heads=(), radius=None, neurons=0)


def with_layer(**changes: object) -> PruningPlan:
    """Return the whole plan with its second layer changed."""
    layer = replace(full_layer(SHAPE), **changes)
    return WHOLE.with_layers((WHOLE.layers[0], layer, WHOLE.layers[2]))


def with_shape(**changes: int) -> PruningPlan:
    return replace(WHOLE, model=replace(IDENTITY, shape=replace(SHAPE, **changes)))


def test_the_whole_plan_is_valid_and_keeps_everything() -> None:
    assert all(layer.is_full(SHAPE) for layer in WHOLE.layers)
    assert WHOLE.visual_depth == SHAPE.layers and not WHOLE.needs_order
    assert WORKLOAD.visual == 19 and SHAPE.group == 3


INVALID = {
    "layers[1].attend_heads must be a tuple of heads, empty for none, found True": lambda: (
        with_layer(attend_heads=True)
    ),
    "layers[1].read_heads must be a tuple of heads, empty for none, found 'all'": lambda: (
        with_layer(read_heads="all")
    ),
    "layers[1].read_heads names head 6": lambda: with_layer(read_heads=(0, 6)),
    "layers[1].read_heads names head -1": lambda: with_layer(read_heads=(-1, 0)),
    "layers[1].read_heads must be ascending": lambda: with_layer(read_heads=(2, 1)),
    "layers[1].read_heads must be ascending and without": lambda: with_layer(read_heads=(1, 1)),
    "layers[1].attend_heads must name heads that read": lambda: with_layer(read_heads=()),
    "layers[1].attend_heads must name heads": lambda: with_layer(
        read_heads=(1, 2), attend_heads=(2, 3)
    ),
    "layers[1].attend_heads must be ascending": lambda: with_layer(attend_heads=(2, 1)),
    "layers[1].qkv_rank must lie between 1 and": lambda: with_layer(qkv_rank=0),
    "layers[1].qkv_rank must lie between 1": lambda: with_layer(
        read_heads=(), attend_heads=(), qkv_rank=4
    ),
    "layers[1].qkv_rank needs 'compensation: refit'": lambda: with_layer(qkv_rank=4),
    "layers[1].map_rank needs 'compensation: refit'": lambda: with_layer(neurons=7, map_rank=4),
    "layers[1].map_rank must lie between 0": lambda: with_layer(neurons=7, map_rank=-1),
    "layers[1].map_rank must be 0 when all neurons": lambda: with_layer(map_rank=4),
    "layers[1].radius must be null or at least 0, found -1": lambda: with_layer(radius=-1),
    "layers[1].neurons must lie between 0 and 50, found 51": lambda: with_layer(neurons=51),
    "layers[1].neurons must lie": lambda: with_layer(neurons=-1),
    "layers must have 3 entries, found 2": lambda: WHOLE.with_layers(WHOLE.layers[:2]),
    "model.shape must hold positive": lambda: with_shape(layers=0),
    "model.shape.kv_heads must divide the 6": lambda: with_shape(kv_heads=4),
    "workload.grids must hold": lambda: replace(WHOLE, workload=Workload((), 3)),
    "workload.grids must": lambda: replace(WHOLE, workload=Workload((Grid(0, 3),), 3)),
    "workload.text_before must": lambda: replace(WHOLE, workload=Workload((Grid(1, 1),), 3, 4)),
    "workload.text_between must have a number": lambda: replace(
        WHOLE, workload=Workload((Grid(1, 1),), 3, text_between=(1,))
    ),
    "workload.text_between must not be": lambda: replace(
        WHOLE, workload=Workload((Grid(1, 1),) * 2, 3, text_between=(-1,))
    ),
    "workload.row_ends must not be": lambda: replace(
        WHOLE, workload=Workload((Grid(2, 1),), 3, row_ends=-1)
    ),
    "workload.text must be at least the 5 tokens": lambda: replace(
        WHOLE, workload=Workload((Grid(3, 1), Grid(1, 1)), 4, 1, (2,), 1)
    ),
    "compensation must be one of none, mean": lambda: replace(WHOLE, compensation="least"),
    "budget.asked must lie in (0, 1], found 0": lambda: replace(WHOLE, budget=Budget(0, 1)),
    "budget.asked must lie in (0, 1], found nan": lambda: replace(
        WHOLE, budget=Budget(float("nan"), 1)
    ),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_plans_name_the_key(message: str) -> None:
    with pytest.raises(InvalidPlan) as caught:
        INVALID[message]()
    assert f"plan: {message}" in str(caught.value)
    assert isinstance(caught.value, PlanError)


def test_pruned_neurons_need_an_order_unless_already_sorted() -> None:
    layers = with_layer(neurons=0).layers  # nothing left to order
    assert not WHOLE.with_layers(layers).needs_order
    some = replace(full_layer(SHAPE), neurons=7)
    partial = replace(WHOLE, layers=(some,) * 3)
    assert partial.needs_order and partial.tensors == PlanTensors()
    with pytest.raises(PlanError, match="The plan: lacks neuron_order, which the plan needs"):
        check_tensors(partial)
    check_tensors(replace(partial, tensors=PlanTensors(torch.arange(50).repeat(3, 1))))
    baked = replace(partial, baked=True)
    assert baked.needs_order
    check_tensors(baked)


def test_visual_depth_ends_after_the_last_visual_layer() -> None:
    reads = replace(NONE, read_heads=(2,))
    feeds = replace(NONE, neurons=SHAPE.ffn)
    for layers, depth in (
        ((NONE, NONE, NONE), 0),
        ((reads, NONE, NONE), 1),
        ((NONE, feeds, NONE), 2),
        ((feeds, NONE, reads), 3),
    ):
        assert WHOLE.with_layers(layers).visual_depth == depth


def test_a_kv_head_is_kept_if_one_of_its_query_heads_is() -> None:
    for read_heads, kept in (((), ()), ((0,), (0,)), ((2, 3), (0, 1)), ((4, 5), (1,))):
        assert replace(NONE, read_heads=read_heads).kept_kv(SHAPE) == kept


@settings(max_examples=50)
@given(rng=st.randoms(use_true_random=False))
def test_kept_kv_heads_are_those_of_kept_heads(rng: random.Random) -> None:
    layer = tiny.random_layer(SHAPE, rng)
    kept = layer.kept_kv(SHAPE)
    assert set(kept) == {head // 3 for head in layer.read_heads}
    assert len(kept) <= len(layer.read_heads) <= len(kept) * SHAPE.group
    assert layer.is_empty == (not layer.read_heads and not layer.neurons)


def test_plans_are_frozen() -> None:
    for record in (WHOLE, WHOLE.layers[0], WHOLE.model, WHOLE.workload, WHOLE.budget):
        name = dataclasses.fields(record)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)
