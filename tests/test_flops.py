"""FLOPs and bytes in closed form match the paper's numbers and hold for any plan."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_layer, random_plan

from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_flops,
    dense_visual_kv_bytes,
    head_counts,
    prefill_flops,
    visual_budget,
    visual_flops,
    visual_flops_of_layer,
    visual_kv_bytes,
)
from yopo.plans.grid import Grid
from yopo.plans.schema import (
    Budget,
    LayerPlan,
    ModelIdentity,
    ModelShape,
    PruningPlan,
    Workload,
    full_layer,
    full_plan,
)

LLAVA_7B = ModelShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008)
LLAVA_13B = ModelShape(layers=40, hidden=5120, heads=40, kv_heads=40, head_dim=128, ffn=13824)
GQA = ModelShape(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, ffn=18944)
TINY = ModelShape(layers=3, hidden=60, heads=6, kv_heads=2, head_dim=16, ffn=50)
IMAGE = Workload((Grid(24, 24),), text=64, text_before=35)
SHAPES = pytest.mark.parametrize("shape", [LLAVA_7B, LLAVA_13B, GQA, TINY], ids=str)
RANDOM = st.randoms(use_true_random=False)


def identity(shape: ModelShape) -> ModelIdentity:
    return ModelIdentity("some", "llava", shape, "0" * 64)


def papers_plan(shape: ModelShape, share: int) -> PruningPlan:
    """Half of the layers, one in ``share`` heads and neurons, radius 2."""
    heads = tuple(range(shape.heads // share))
    some = LayerPlan(heads, attend_heads=heads, radius=2, neurons=shape.ffn // share)
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    half = shape.layers // 2
    layers = (some,) * half + (none,) * (shape.layers - half)
    return PruningPlan(identity(shape), IMAGE, layers, Budget(None, 0.0), baked=True)


@pytest.mark.parametrize(("shape", "tera"), [(LLAVA_7B, 7.63), (LLAVA_13B, 14.89)])
def test_dense_flops_are_the_papers_figures(shape: ModelShape, tera: float) -> None:
    assert round(dense_visual_flops(shape, IMAGE) / 1e12, 2) == tera


@pytest.mark.parametrize(
    ("shape", "share", "percent"),
    [(LLAVA_7B, 2, 24.5), (LLAVA_7B, 4, 12.3), (LLAVA_13B, 2, 24.6), (LLAVA_13B, 4, 12.3)],
)
def test_pruned_flops_are_the_papers_figures(shape: ModelShape, share: int, percent: float) -> None:
    assert round(100 * visual_budget(papers_plan(shape, share)), 1) == percent


@SHAPES
def test_dense_flops_follow_the_papers_formula(shape: ModelShape) -> None:
    n, d, m = IMAGE.visual, shape.hidden, shape.ffn
    if shape.heads == shape.kv_heads:
        assert dense_visual_flops(shape, IMAGE) == shape.layers * (
            n * (8 * d**2 + 6 * d * m) + 4 * n**2 * d
        )
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = 2 * n * d * (2 * q + 2 * kv)
    assert dense_visual_flops(shape, IMAGE) == shape.layers * (
        projections + 6 * n * d * m + 4 * n**2 * q
    )


@SHAPES
def test_the_whole_plan_costs_what_the_dense_model_costs(shape: ModelShape) -> None:
    plan = full_plan(identity(shape), IMAGE)
    assert visual_budget(plan) == 1.0
    assert visual_flops(plan) == dense_visual_flops(shape, IMAGE)
    assert visual_kv_bytes(plan) == dense_visual_kv_bytes(shape, IMAGE)
    assert prefill_flops(plan) <= dense_prefill_flops(shape, IMAGE)


@SHAPES
def test_a_plan_without_visual_work_has_no_visual_cost(shape: ModelShape) -> None:
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    plan = full_plan(identity(shape), IMAGE).with_layers((none,) * shape.layers)
    text_alone = Workload((Grid(1, 1),), IMAGE.text)
    assert visual_budget(plan) == 0.0 and visual_kv_bytes(plan) == 0
    dense_text = full_plan(identity(shape), text_alone).with_layers(plan.layers)
    assert prefill_flops(plan) == prefill_flops(dense_text)


def test_grouped_heads_shrink_keys_and_values_by_kv_head() -> None:
    """Two query heads of one KV head need one key; of two KV heads, two."""
    same = LayerPlan((0, 1), attend_heads=(), radius=None, neurons=0)
    two = LayerPlan((0, 3), attend_heads=(), radius=None, neurons=0)
    workload = Workload((Grid(4, 4),), 10)
    one_kv = visual_flops_of_layer(same, TINY, workload)
    assert one_kv == 2 * 2 * workload.visual * TINY.hidden * TINY.head_dim
    assert visual_flops_of_layer(two, TINY, workload) == 2 * one_kv
    plan = full_plan(identity(TINY), workload)
    sizes = [visual_kv_bytes(plan.with_layers((each,) * 3)) for each in (same, two)]
    assert sizes == [3 * 2 * 16 * 16 * 2, 2 * 3 * 2 * 16 * 16 * 2]
    assert visual_kv_bytes(plan, itemsize=4) == 2 * visual_kv_bytes(plan)


def smaller(layer: LayerPlan, rng: random.Random) -> LayerPlan:
    """Return the layer with one more thing removed, if any is left."""
    choice = rng.choice(["head", "attend", "radius", "neurons", "bottleneck", "map"])
    if choice == "head" and layer.read_heads:
        gone = rng.choice(layer.read_heads)
        heads = tuple(head for head in layer.read_heads if head != gone)
        attend = tuple(head for head in layer.attend_heads if head != gone)
        rank = layer.qkv_rank if heads else None
        return replace(layer, read_heads=heads, attend_heads=attend, qkv_rank=rank)
    if choice == "attend":
        return replace(layer, attend_heads=layer.attend_heads[1:])
    if choice == "bottleneck" and layer.qkv_rank:
        return replace(layer, qkv_rank=max(1, layer.qkv_rank - 3))
    if choice == "map":
        return replace(layer, map_rank=max(0, layer.map_rank - 2))
    if choice == "radius":
        return replace(layer, radius=3 if layer.radius is None else max(0, layer.radius - 1))
    return replace(layer, neurons=max(0, layer.neurons - rng.randint(1, 20)))


@given(rng=RANDOM)
def test_removing_anything_never_adds_visual_flops_or_bytes(rng: random.Random) -> None:
    plan = random_plan(identity(TINY), rng)
    index = rng.randrange(TINY.layers)
    less = smaller(plan.layers[index], rng)
    pruned = plan.with_layers((*plan.layers[:index], less, *plan.layers[index + 1 :]))
    assert visual_flops(pruned) <= visual_flops(plan)
    assert visual_kv_bytes(pruned) <= visual_kv_bytes(plan)
    assert 0.0 <= visual_budget(pruned) <= visual_budget(plan)
    if plan.compensation != "refit":  # a wide bottleneck costs more than it saves
        assert visual_budget(plan) <= 1.0


@given(rng=RANDOM)
def test_removing_neurons_or_attention_never_adds_prefill_flops(rng: random.Random) -> None:
    plan = random_plan(identity(TINY), rng, bidirectional=False)
    for change in ({"neurons": 0}, {"attend_heads": ()}, {"radius": 0}):
        less = plan.with_layers([replace(layer, **change) for layer in plan.layers])
        assert prefill_flops(less) <= prefill_flops(plan)


@given(rng=RANDOM)
def test_head_rectangles_hold_every_head(rng: random.Random) -> None:
    layer = random_layer(TINY, rng)
    counts = head_counts(layer, TINY)
    assert counts.reading >= len(layer.read_heads)
    assert counts.text_only >= TINY.heads - len(layer.read_heads)
    if len(layer.read_heads) in (0, TINY.heads):
        assert (counts.reading, counts.text_only) == (
            len(layer.read_heads),
            TINY.heads - counts.reading,
        )


def test_head_rectangles_of_multi_head_attention_are_never_padded() -> None:
    for count in range(33):
        heads = tuple(range(count))
        layer = replace(full_layer(LLAVA_7B), read_heads=heads, attend_heads=heads)
        assert head_counts(layer, LLAVA_7B).reading == count
        assert head_counts(layer, LLAVA_7B).text_only == 32 - count
