"""One object is the whole plan: it is made in memory, run, written, read and run again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny import PICTURE, Subject

import yopo
from yopo.plans.flops import visual_budget
from yopo.plans.schema import Budget, LayerPlan, PruningPlan
from yopo.plans.storage import write_plan
from yopo.plans.tensors import PlanTensors
from yopo.support.errors import PlanError

INPUTS = tiny.batch([[1, 5, 6, *PICTURE, 7, 8], [1, 9, *PICTURE, 4]])


def by_hand(subject: Subject) -> PruningPlan:
    """Make a plan that prunes neurons, as a script would."""
    shape = subject.shape
    heads = tuple(range(shape.heads))
    full = LayerPlan(heads, heads, None, shape.ffn)
    layers = (full, LayerPlan(heads[1:], heads[1:2], 1, 30), LayerPlan(heads[:1], (), None, 1))
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(shape.ffn, generator=generator) for _ in range(shape.layers)]
    plan = PruningPlan(
        model=subject.identity,
        workload=tiny.workload(),
        layers=(*layers, *(full,) * (shape.layers - len(layers))),
        budget=Budget(None, 1.0),
        tensors=PlanTensors(neuron_order=torch.stack(orders)),
    )
    return replace(plan, budget=Budget(None, round(visual_budget(plan), 6)))


def random_refit(subject: Subject) -> PruningPlan:
    return subject.random_plan(6, compensation="refit", baked=False)


def random_mean(subject: Subject) -> PruningPlan:
    return subject.random_plan(2, compensation="mean", baked=False)


def logits_under(subject: Subject, plan: PruningPlan | str | Path) -> torch.Tensor:
    with yopo.pruned(subject.model, plan):
        return tiny.logits(subject.model, INPUTS)


@pytest.mark.parametrize("make", [by_hand, random_mean, random_refit])
def test_a_plan_made_in_memory_survives_running_writing_and_reading(
    subject: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Subject], PruningPlan],
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make(subject)
    assert plan.needs_order
    expected = logits_under(subject, plan)
    text = tiny.real_text(INPUTS)
    assert not torch.equal(expected[text], tiny.logits(subject.model, INPUTS)[text])
    write_plan(plan, "plan.yaml")
    found = yopo.read_plan("plan.yaml")
    assert found == plan and found.tensors == plan.tensors
    assert torch.equal(logits_under(subject, yopo.read_plan("plan.yaml")), expected)
    assert torch.equal(logits_under(subject, "plan.yaml"), expected)
    assert torch.equal(logits_under(subject, Path("plan.yaml")), expected)


def test_the_order_decides_which_neurons_are_used(mha: Subject) -> None:
    plan = by_hand(mha)
    turned = PlanTensors(neuron_order=plan.tensors.neuron_order.flip(1))
    other = replace(plan, tensors=turned)
    assert other != plan
    text = tiny.real_text(INPUTS)
    assert not torch.equal(logits_under(mha, other)[text], logits_under(mha, plan)[text])


def test_a_plan_that_lacks_its_order_is_neither_run_nor_written(
    mha: Subject, tmp_path: Path
) -> None:
    plan = by_hand(mha).without_tensors()
    for use in (
        lambda: logits_under(mha, plan),
        lambda: write_plan(plan, str(tmp_path / "plan.yaml")),
    ):
        with pytest.raises(PlanError, match="The plan: lacks neuron_order, which the plan needs"):
            use()
    assert not hasattr(mha.model.get_decoder(), "yopo") and not list(tmp_path.iterdir())
