"""On every family, a prefill that is replayed from a recording gives what it would give without."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tiny
import torch
from tape import replays_of
from zoo import PROMPTS, Specimen

from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned

STORED = {
    "whole": lambda plan, seed: plan,
    "in few bits": tiny.in_few_bits,
    "as latents": tiny.as_latents,
}


def plan_of(specimen: Specimen, stored: str) -> PruningPlan:
    """A random plan that reads visual tokens in some layers."""
    plans = (specimen.plan(seed) for seed in range(3, 100))
    reading = (each for each in plans if sum(bool(one.read_heads) for one in each.layers) > 1)
    return STORED[stored](next(reading), 3)


def in_both_ways(model: Any, plan: PruningPlan, call: Any) -> tuple[Any, Any]:
    """What a call gives with recordings, which it makes or uses, and without."""
    with pruned(model, plan, cuda_graphs=False):
        expected = call()
    with pruned(model, plan):
        found = call()
        assert replays_of(model) > 0
    return found, expected


@pytest.mark.parametrize("stored", STORED)
def test_prefills(specimen: Specimen, at_once: None, stored: str) -> None:
    plan, model = plan_of(specimen, stored), specimen.oracle
    for rows in (PROMPTS | specimen.entry.prompts).values():
        inputs = specimen.inputs(rows)
        found, expected = in_both_ways(model, plan, partial(tiny.logits, model, inputs))
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("stored", STORED)
def test_generate(specimen: Specimen, at_once: None, stored: str) -> None:
    plan, model = plan_of(specimen, stored), specimen.oracle
    inputs = specimen.inputs(PROMPTS["padded, different images"])
    found, expected = in_both_ways(model, plan, lambda: specimen.generate(model, inputs))
    assert torch.equal(found, expected)


def test_one_recording_serves_other_images_and_words(specimen: Specimen, tape: None) -> None:
    plan, model = plan_of(specimen, "whole"), specimen.oracle
    prompts = [
        specimen.inputs([[1, 5, 6, "A", *words]], seed=seed)
        for seed, words in enumerate(((7, 8, 9), (9, 8, 7), (10, 11), tuple(range(2, 14))))
    ]

    def call() -> list[torch.Tensor]:
        return [tiny.logits(model, each) for each in prompts]

    for one, other in zip(*in_both_ways(model, plan, call), strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()
