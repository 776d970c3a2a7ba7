"""What a real GPU computes: as the specification, as one device, as a calibration on a CPU.

Skipped without CUDA. One GPU suffices: it and the CPU are two devices.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from devices import device_map
from torch import nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import zoo
from zoo import PROMPTS, Specimen

import yopo
from yopo.bench.run import BenchOptions, Sizes, bench_model
from yopo.checkpoint.bake import bake
from yopo.data.prompts import Batch
from yopo.fitting.layerwise import enter
from yopo.fitting.refit import refit
from yopo.pipeline.commands import calibrate, evaluate
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.request import plan_request
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

GPU = torch.device("cuda:0")
NAMES = ("llava-mha", "llava-next-mistral", "qwen2.5-vl", "qwen3-vl", "internvl-phi3", "mistral3")
ENTRIES = [entry for entry in zoo.all_entries() if entry.name in NAMES]
ROWS = PROMPTS["padded, different images"]
STORED = ("whole", "in few bits", "as latents")


@pytest.fixture(scope="module", params=ENTRIES, ids=lambda entry: entry.name)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    return zoo.build(request.param)


def on_gpu(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    return copy.deepcopy(model).to(GPU, dtype)


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the first half of its layers on the CPU, which runs them, the rest on the GPU."""
    model, places = copy.deepcopy(model), device_map(model, "cpu", GPU)
    attach_align_device_hook_on_blocks(
        model,
        execution_device=places | {"": "cpu"},
        offload=dict.fromkeys(places, False),
        skip_keys=model._skip_keys_device_placement,
    )
    found = {each.device.type for each in model.get_decoder().layers.parameters()}
    assert found == {"cpu", GPU.type}
    return model


def placed(inputs: dict[str, Any], model: nn.Module, device: Any) -> dict[str, Any]:
    moved = {name: each.to(device) for name, each in inputs.items()}
    return tiny.as_dtype(moved, model.dtype)


def plan_of(specimen: Specimen, stored: str) -> PruningPlan:
    """A plan that reads visual tokens in both halves of the layers."""
    plans = map(specimen.plan, range(100))
    reading = (
        plan
        for plan in plans
        if all(any(each.read_heads for each in part) for part in (plan.layers[:2], plan.layers[2:]))
    )
    first, second, third = islice(reading, 3)
    if stored == "whole":
        return first
    return (tiny.in_few_bits if stored == "in few bits" else tiny.as_latents)(
        second if stored == "in few bits" else third, 1
    )


def assert_near(one: torch.Tensor, other: torch.Tensor, share: float) -> None:
    one, other = one.cpu().double(), other.cpu().double()
    assert (one - other).abs().max() <= share * other.abs().max()


# One GPU: the specification


@pytest.mark.parametrize("stored", STORED)
def test_in_float64_the_gpu_is_the_specification(specimen: Specimen, stored: str) -> None:
    plan, inputs = plan_of(specimen, stored), specimen.inputs(ROWS)
    where = specimen.text_positions(inputs)
    model = on_gpu(specimen.oracle, torch.float64)
    with reference(specimen.oracle, plan):
        expected = tiny.logits(specimen.oracle, inputs)[where]
    with pruned(model, plan, check=False):
        found = tiny.logits(model, placed(inputs, model, GPU)).cpu()[where]
        said = specimen.generate(model, placed(inputs, model, GPU)).cpu()
    assert_near(found, expected, 1e-6)  # cosines of positions are of float32, by either's library
    with pruned(specimen.oracle, plan):
        assert torch.equal(said, specimen.generate(specimen.oracle, inputs))
    dense = tiny.logits(specimen.oracle, inputs)[where]
    assert not torch.allclose(dense, expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_less_precision_it_errs_as_the_specification(
    specimen: Specimen, dtype: torch.dtype
) -> None:
    plan, inputs = plan_of(specimen, "whole"), specimen.inputs(ROWS)
    where = specimen.text_positions(inputs)
    model = on_gpu(specimen.model, dtype)
    # The specification runs on the host; in float64 with the same rounded weights, so that only the
    # computation's own errors are compared.
    host = copy.deepcopy(specimen.model).to(dtype)
    exact = tiny.exact(host)
    with reference(exact, plan, check=False):
        oracle = tiny.logits(exact, placed(inputs, exact, "cpu"))
    with reference(host, plan, check=False):
        usual = tiny.logits(host, placed(inputs, host, "cpu"))
    with pruned(model, plan, check=False):
        found = tiny.logits(model, placed(inputs, model, GPU)).cpu()
    tiny.assert_close(found, usual, oracle, where)


# Two devices


@pytest.mark.parametrize("stored", STORED)
def test_a_halved_decoder_is_the_whole_one(specimen: Specimen, stored: str) -> None:
    plan, inputs = plan_of(specimen, stored), specimen.inputs(ROWS)
    model = halved(specimen.oracle)
    where = specimen.text_positions(inputs)
    for switch in (False, True):
        found = []
        for each in (specimen.oracle, model):
            each.train(False)
            given = placed(inputs, each, "cpu")
            if not switch:
                found.append((tiny.logits(each, given), specimen.generate(each, given)))
                continue
            with pruned(each, plan, check=False):
                found.append((tiny.logits(each, given), specimen.generate(each, given)))
        assert_near(found[1][0].cpu()[where], found[0][0][where], 1e-9)
        assert torch.equal(found[1][1].cpu(), found[0][1])


def test_a_halved_decoder_is_fitted(specimen: Specimen) -> None:
    """Fits of equal quality: their weights need not be equal, as a bottleneck has no one basis."""
    plan = plan_of(specimen, "whole")
    plan = replace(plan, compensation="refit", bidirectional=False, baked=False)
    plan = replace(plan, tensors=replace(plan.tensors, neuron_mean=None, head_mean=None, refit={}))
    inputs = specimen.inputs(PROMPTS["two images"])
    found = []
    for model in (specimen.model, halved(specimen.model)):
        (weights,) = refit(model, enter(model, [Batch(inputs, None, ())]), [plan])
        assert weights
        fitted = replace(plan, tensors=replace(plan.tensors, refit=weights))
        with pruned(specimen.model, fitted, check=False):
            found.append(tiny.logits(specimen.model, inputs))
    assert_near(found[1], found[0], 2e-2)


# Whole commands


@pytest.fixture(scope="module")
def demo() -> tuple[PreTrainedModel, Any]:
    """A demo model and its processor."""
    from yopo.pipeline.model_handle import ModelHandle

    handle = ModelHandle("llava-tiny", None, RunOptions())
    return handle.model, handle.processor


def made(model: PreTrainedModel, processor: Any) -> tuple[PruningPlan, float]:
    """A plan, and its logit KL on held-out pairs."""
    options = RunOptions(samples=64, batch_size=16, max_new_tokens=4)
    request = plan_request(budget=0.25, compensation="refit")
    fit = FitOptions(measure_pairs=16, fit_pairs=32)
    plan = calibrate(model, request, options=options, fit_options=fit, processor=processor).plan
    found = evaluate(
        plan,
        options=RunOptions(samples=64, batch_size=16, max_new_tokens=4),
        model=model,
        timing_runs=0,
        processor=processor,
    )
    return plan, found.fidelity.kl


def test_a_calibration_is_as_good_on_the_gpu_and_on_two_devices(
    demo: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.try_few_plans(monkeypatch)
    model, processor = demo
    places = (model, copy.deepcopy(model).to(GPU), halved(model))
    (usual, kl), *others = (made(each, processor) for each in places)
    for plan, other in others:
        assert plan.model == usual.model
        assert plan.budget.reached == pytest.approx(usual.budget.reached, abs=0.01)
        assert other <= 1.25 * kl + 1e-3, (kl, other)


def baked(demo: tuple[PreTrainedModel, Any], folder: Path) -> tuple[Path, PruningPlan]:
    model, processor = demo
    source, path = folder / "source", folder / "baked"
    model.save_pretrained(source)
    processor.save_pretrained(source)
    request = plan_request(budget=0.3, template="reader")
    options = RunOptions(data="demo:calibration", samples=32, batch_size=16, max_new_tokens=2)
    plan = calibrate(source, request, options=options).plan
    bake(plan, source, path)
    return path, plan


def test_a_baked_checkpoint_is_loaded_onto_devices(
    demo: tuple[PreTrainedModel, Any], tmp_path: Path
) -> None:
    path, _ = baked(demo, tmp_path)
    usual = yopo.load(path, dtype=torch.float32)
    image = usual.config.image_token_id
    side = usual.config.vision_config.image_size
    count = usual.config.image_seq_length
    inputs = {
        "input_ids": torch.tensor([[1, 5, *[image] * count, 6, 7]]),
        "pixel_values": torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)),
    }
    expected = tiny.logits(usual, inputs)[:, -2:]
    some = device_map(usual, 0, "cpu")  # beside a GPU: kept on the CPU, run on the GPU
    for places in ("auto", "cuda:0", some):
        model = yopo.load(path, dtype=torch.float32, device_map=places)
        assert yopo.is_pruned(model)
        given = {name: each.to(GPU) for name, each in inputs.items()}
        assert_near(tiny.logits(model, given)[:, -2:], expected, 1e-3)
    assert model.get_decoder().layers[-1].mlp.up_proj.weight.is_meta


def test_bench_measures_time_and_memory(demo: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    _, plan = baked(demo, tmp_path)
    options = BenchOptions(runs=2, decode_steps=2)
    for model in (copy.deepcopy(demo[0]).to(GPU), halved(demo[0])):
        found = bench_model(model, plan, Sizes(), options)
        is_whole = "," not in found.device
        assert found.measured["pruned"].prefill.ratio.median > 0
        assert (found.measured["pruned"].peak_memory is not None) == is_whole
