"""The decoder executes the FLOPs that ``flops.py`` predicts, as counted by torch.

Attention uses the math kernel, because the counter does not see the fused one on CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import IMAGE, Subject
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from yopo.plans.flops import dense_prefill_flops, prefill_flops, visual_flops
from yopo.plans.schema import LayerPlan
from yopo.runtime.install import pruned

SIDE = 12
"""Large enough that images are cut into more than one block of rows."""

INPUTS = tiny.batch([[1, 5, 6, *[IMAGE] * SIDE**2, *range(7, 24)]], side=SIDE)
WORKLOAD = tiny.workload(side=SIDE, text=20, text_before=3)


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return tiny.make_subject(request.param, side=SIDE)


def executed(subject: Subject, inputs: dict[str, Any] = INPUTS) -> int:
    """Return the matrix-product FLOPs of the text decoder in one forward."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        tiny.logits(subject.model, inputs)
    counts = counter.get_flop_counts()
    (decoder,) = (name for name in counts if name.endswith("model.language_model"))
    return sum(counts[decoder].values())


def test_executed_flops_of_the_dense_model_are_predicted(subject: Subject) -> None:
    assert executed(subject) == pytest.approx(
        dense_prefill_flops(subject.shape, WORKLOAD), rel=0.01
    )


@pytest.mark.parametrize("seed", range(8))
def test_executed_flops_of_random_plans_are_predicted(subject: Subject, seed: int) -> None:
    plan = subject.random_plan(seed, workload=WORKLOAD)
    with pruned(subject.model, plan):
        assert executed(subject) == pytest.approx(prefill_flops(plan), rel=0.01)


def test_executed_flops_of_the_papers_shape_are_predicted(subject: Subject) -> None:
    """Half of the layers, heads and neurons, with radius 2."""
    shape = subject.shape
    heads = tuple(range(1, shape.heads, 2))
    some = LayerPlan(heads, attend_heads=heads, radius=2, neurons=shape.ffn // 2)
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    plan = subject.random_plan(
        0, layers=(some, some, none, none), workload=WORKLOAD, compensation="none"
    )
    with pruned(subject.model, plan):
        count = executed(subject)
    assert count == pytest.approx(prefill_flops(plan), rel=0.01)
    assert count < 0.5 * dense_prefill_flops(shape, WORKLOAD)


def test_layers_without_visual_work_cost_only_text(subject: Subject) -> None:
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    plan = subject.random_plan(0, layers=(none,) * 4, workload=WORKLOAD)
    text = {key: INPUTS[key][:, :20] for key in ("input_ids", "attention_mask")}
    text["input_ids"] = torch.arange(1, 21)[None]
    assert visual_flops(plan) == 0
    with pruned(subject.model, plan):
        assert executed(subject) == pytest.approx(executed(subject, text), rel=0.01)


def test_a_decode_step_reads_visual_keys_only_of_kept_heads(subject: Subject) -> None:
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    counts = {}
    for name, layers in (("none", (none,) * 4), ("all", tiny.whole(subject).layers)):
        plan = subject.random_plan(0, layers=layers, compensation="none")
        with torch.no_grad(), pruned(subject.model, plan):
            cache = subject.model(**INPUTS).past_key_values
            step = {"input_ids": torch.tensor([[9]]), "past_key_values": cache}
            counts[name] = executed(subject, step)
    shape = subject.shape
    reads = 4 * shape.layers * shape.heads * shape.head_dim * SIDE**2
    assert counts["all"] - counts["none"] == reads
