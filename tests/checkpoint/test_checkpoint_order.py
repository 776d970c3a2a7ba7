"""The baked order puts kept heads first, sorts by activity, keeps groups and renames plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from yopo.checkpoint.order import baked_plan, order_heads, order_layers
from yopo.plans.checks import check_tensors
from yopo.plans.file import parse_plan, to_yaml
from yopo.plans.schema import LayerPlan, ModelShape
from yopo.plans.tensors import PlanTensors

MHA = ModelShape(layers=1, hidden=8, heads=6, kv_heads=6, head_dim=2, ffn=4)
GQA = ModelShape(layers=1, hidden=8, heads=6, kv_heads=2, head_dim=2, ffn=4)


def keep(*heads: int) -> LayerPlan:
    return LayerPlan(heads, attend_heads=heads, radius=None, neurons=2)


def test_kept_heads_come_first_and_both_parts_are_sorted_by_activity() -> None:
    activity = (0.9, 0.1, 0.5, 0.7, 0.2, 0.3)
    heads, kv_heads = order_heads(keep(1, 3, 5), MHA, activity)
    assert heads == (3, 5, 1, 0, 2, 4)
    assert kv_heads == heads


def test_without_activity_the_index_decides() -> None:
    assert order_heads(keep(1, 4), MHA, (0.0,) * 6)[0] == (1, 4, 0, 2, 3, 5)


@pytest.mark.parametrize(
    ("kept", "heads", "kv_heads"),
    [
        ((0, 4, 5), (5, 4, 3, 0, 2, 1), (1, 0)),  # two kept heads beat one that is more active
        ((1, 4), (1, 2, 0, 4, 5, 3), (0, 1)),  # equally many: the group's most active head
        ((), (2, 0, 1, 5, 4, 3), (0, 1)),
    ],
)
def test_gqa_keeps_groups_whole(kept, heads, kv_heads) -> None:
    activity = (0.3, 0.2, 0.9, 0.1, 0.6, 0.8)
    assert order_heads(keep(*kept), GQA, activity) == (heads, kv_heads)


@pytest.mark.parametrize("compensation", ["mean", "refit"])
@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_baked_plan_keeps_the_same_heads_under_new_names(
    kind, compensation, saved, make_plan
) -> None:
    plan = make_plan(saved(kind).model, compensation=compensation)
    orders = order_layers(plan)
    baked = baked_plan(plan, orders)
    for old, new, order in zip(plan.layers, baked.layers, orders, strict=True):
        assert {order.head_order[head] for head in new.read_heads} == set(old.read_heads)
        assert {order.head_order[head] for head in new.attend_heads} == set(old.attend_heads)
        assert len(new.kept_kv(plan.model.shape)) == len(old.kept_kv(plan.model.shape))
        assert (new.radius, new.neurons) == (old.radius, old.neurons)
        assert (new.qkv_rank, new.map_rank) == (old.qkv_rank, old.map_rank)
        if kind == "mha":
            assert new.read_heads == tuple(range(len(old.read_heads)))
            assert new.attend_heads == tuple(range(len(old.attend_heads)))
    assert baked.baked and baked.model == plan.model
    assert baked.provenance == {**plan.provenance, "baked_from": plan.model.fingerprint}
    rho = [plan.measured.rho[0][old] for old in orders[0].head_order]
    assert baked.measured.rho[0] == tuple(rho)
    if compensation == "mean":  # all heads of this layer attend, so only activity decides
        assert rho == sorted(rho, reverse=True)
    again, _ = parse_plan("again", to_yaml(baked))
    assert again.layers == baked.layers


def test_baked_tensors_follow_the_order(saved, make_plan) -> None:
    plan = make_plan(saved().model, compensation="mean")
    orders = order_layers(plan)
    tensors, baked = plan.tensors, baked_plan(plan, orders).tensors
    assert baked.neuron_order is None
    for layer, order in enumerate(orders):
        assert torch.equal(order.neuron_order, tensors.neuron_order[layer])
        for new, old in enumerate(order.neuron_order.tolist()):
            assert baked.neuron_mean[layer, new] == tensors.neuron_mean[layer, old]
        for new, old in enumerate(order.head_order):
            assert torch.equal(baked.head_mean[layer, new], tensors.head_mean[layer, old])


@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_fitted_weights_follow_the_heads(kind, saved, make_plan) -> None:
    plan = make_plan(saved(kind).model, compensation="refit")
    orders = order_layers(plan)
    renamed = baked_plan(plan, orders)
    assert renamed.tensors.neuron_order is None
    check_tensors(renamed, "The baked plan")
    shape, moved = plan.model.shape, 0
    for index, (old, new, order) in enumerate(
        zip(plan.layers, renamed.layers, orders, strict=True)
    ):
        before, after = plan.tensors.refit[index], renamed.tensors.refit[index]
        assert before.keys() == after.keys()
        kv_pairs = (new.kept_kv(shape), old.kept_kv(shape), order.kv_order)
        pairs = {"query": (new.attend_heads, old.attend_heads, order.head_order)}
        pairs |= {"key": kv_pairs, "value": kv_pairs, "output": pairs["query"]}
        for name in before:
            kind_of = name.removesuffix("_bias")
            if kind_of not in pairs or name == "output_bias":
                assert torch.equal(after[name], before[name]), name
                continue
            found, expected = (
                (each[name].T if name == "output" else each[name]).split(shape.head_dim)
                for each in (after, before)
            )
            now, then, was = pairs[kind_of]
            for place, head in enumerate(now):
                assert torch.equal(found[place], expected[then.index(was[head])]), name
            moved += not torch.equal(after[name], before[name])
    assert moved > 2


def test_plans_without_compensation_bake_no_tensors(saved, make_plan) -> None:
    plan = make_plan(saved().model)
    assert plan.tensors.num_bytes
    assert baked_plan(plan, order_layers(plan)).tensors == PlanTensors()


def test_a_plan_without_tensors_leaves_the_neurons_in_place(saved, make_plan) -> None:
    plan = make_plan(saved().model).without_tensors()
    full = tuple(replace(layer, neurons=plan.model.shape.ffn) for layer in plan.layers)
    for order in order_layers(plan.with_layers(full)):
        assert torch.equal(order.neuron_order, torch.arange(plan.model.shape.ffn))
