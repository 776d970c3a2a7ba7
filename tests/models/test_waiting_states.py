"""What waits for its turn is not on the device of a model whose weights are kept elsewhere."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from devices import pretended, spread
from transformers import PreTrainedModel
from zoo import PROMPTS, Specimen

from yopo.calibration.measure import identify
from yopo.data.prompts import Batch
from yopo.data.sources import open_pairs
from yopo.evaluation.fidelity import compare, record_dense
from yopo.fitting.layerwise import DenseWalk, enter
from yopo.fitting.profile import profile
from yopo.fitting.refit import Weights, refit
from yopo.fitting.states import InFiles, InHostMemory
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.options import RunOptions
from yopo.plans.grid import Grid
from yopo.plans.schema import LayerPlan, PruningPlan, Workload, full_plan
from yopo.runtime.install import pruned

GPU = torch.device("cuda", 0)
FIT = tuple[dict[str, Any], dict[int, Weights]]
"""A profile's fields, and fitted weights."""

NAMES = ("one image", "two images", "padded, different images")


def with_layers_elsewhere(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose layers stay in host memory, to be fetched to a device."""
    model = copy.deepcopy(model)
    accelerate.cpu_offload(model.get_decoder().layers, GPU)
    return model


def batches(specimen: Specimen) -> list[Batch]:
    return [Batch(specimen.inputs(PROMPTS[name]), None, ()).to(GPU) for name in NAMES]


def plan_of(specimen: Specimen) -> PruningPlan:
    return specimen.plan(3, baked=False, compensation="refit", bidirectional=False)


@pytest.fixture(scope="module")
def resident(specimen: Specimen) -> FIT:
    """The profile and the fitted weights of a model that is all on the device."""
    with pretended():
        model = spread(specimen.model, GPU)
        entered = enter(model, batches(specimen))
        found = vars(profile(model, entered, specimen.identity.shape))
        (fitted,) = refit(model, entered, [plan_of(specimen)])
    return found, fitted


@pytest.mark.parametrize("kind", ["host", "files"])
def test_a_fit_holds_one_batch_on_the_device(
    specimen: Specimen, resident: FIT, kind: str, tmp_path: Path
) -> None:
    expected, fitted = resident
    model = with_layers_elsewhere(specimen.model)
    with pretended() as places:
        model._apply(lambda each: each.to(GPU))
        enter(model, batches(specimen)[-1:])  # what a forward leaves on its model
        gc.collect()
        before = len(places.on(GPU))
        room = InHostMemory() if kind == "host" else InFiles(tmp_path)
        entered = enter(model, batches(specimen), None, room)
        gc.collect()
        assert len(places.on(GPU)) == before
        walk = DenseWalk(model, entered)
        walk.step(0)
        walk.step(1)
        gc.collect()
        assert len(places.on(GPU)) == before
        found = vars(profile(model, entered, specimen.identity.shape))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        (weights,) = refit(model, entered, [plan_of(specimen)])
        for number, each in fitted.items():
            assert all(torch.equal(weights[number][name], each[name]) for name in each)


@pytest.mark.parametrize("kind", ["host", "files"])
def test_answers_wait_off_the_device(kind: str, tmp_path: Path) -> None:
    handle = ModelHandle("llava-tiny", None, RunOptions())
    model, processor = handle.model, handle.processor
    pairs = list(open_pairs("demo:heldout", samples=8, seed=0))
    how: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 3}
    plan = full_plan(identify(model, "tiny"), Workload((Grid(8, 8),), 16))
    plan = replace(plan, layers=(*plan.layers[:4], *[LayerPlan((), (), None, 0)] * 4))
    expected = record_dense(model, processor, pairs, **how)
    with pruned(model, plan, check=False):
        usual = compare(model, expected)
    with pretended() as places:
        model._apply(lambda each: each.to(GPU))
        record_dense(model, processor, pairs[:2], **how)
        gc.collect()
        before = len(places.on(GPU))
        room = None if kind == "host" else InFiles(tmp_path)
        records = record_dense(model, processor, pairs, **how, room=room)
        gc.collect()
        assert len(places.on(GPU)) == before
        assert [each.answers for each in records] == [each.answers for each in expected]
        with pruned(model, plan, check=False):
            found = compare(model, records)
    assert found.kl == pytest.approx(usual.kl) and usual.kl > 0
