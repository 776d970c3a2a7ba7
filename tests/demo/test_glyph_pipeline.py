"""The glyph reader is calibrated, pruned, baked and evaluated on its own pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from yopo.checkpoint.bake import bake
from yopo.checkpoint.reader import fetch
from yopo.data.prompts import encode, load_processor
from yopo.data.sources import open_pairs
from yopo.demo.glyphs.grids import TASK
from yopo.models.registry import resolve
from yopo.pipeline.commands import calibrate, evaluate
from yopo.pipeline.session import Calibrated, FitOptions, RunOptions
from yopo.planning.request import BudgetRequest
from yopo.plans.flops import visual_budget
from yopo.plans.grid import Grid
from yopo.plans.schema import full_plan
from yopo.runtime.install import pruned
from yopo.serving.loading import load_dense

NAME = "qwen2-vl-tiny"


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    options = RunOptions(samples=32, batch_size=16, max_new_tokens=12)
    fit_options = FitOptions(measure_pairs=12)
    with pytest.MonkeyPatch.context() as patch:
        tiny.try_few_plans(patch)
        return calibrate(NAME, BudgetRequest(0.5), options=options, fit_options=fit_options)


def test_calibration_takes_the_models_own_pairs(calibrated: Calibrated) -> None:
    plan = calibrated.plan
    assert plan.model.name == NAME and plan.provenance["pairs"] == "demo:glyphs-calibration"
    assert plan.workload.grids == (Grid(8, 8),)
    assert 0.4 < visual_budget(plan) <= 0.5
    assert (plan.model.shape.heads, plan.model.shape.kv_heads) == (8, 2)


def test_a_plan_that_prunes_nothing_is_the_dense_model(calibrated: Calibrated) -> None:
    source = resolve(NAME)
    model, processor = load_dense(source), load_processor(source.location)
    pairs = list(open_pairs("demo:glyphs-heldout", samples=7, seed=3))
    inputs = encode(
        processor,
        pairs,
        image_token_id=model.config.image_token_id,
        device="cpu",
        dtype=torch.float32,
        answers=[pair.answers[0] for pair in pairs],
    ).inputs
    assert (inputs["attention_mask"] == 0).any()  # rows of different lengths
    plan = full_plan(calibrated.plan.model, calibrated.plan.workload)
    with torch.inference_mode():
        dense = model(**inputs).logits
        with pruned(model, plan):
            empty = model(**inputs).logits
        with pruned(model, calibrated.plan):
            half = model(**inputs).logits
    is_text = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != model.config.image_token_id)
    torch.testing.assert_close(empty[is_text], dense[is_text], atol=1e-4, rtol=1e-4)
    assert (half[is_text] - dense[is_text]).abs().max() > 1e-3


def test_a_baked_model_is_evaluated_on_held_out_grids(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    target = tmp_path / "smaller"
    bake(calibrated.plan, fetch(resolve(NAME)), target)
    options = RunOptions(samples=36, batch_size=18, max_new_tokens=12)
    found = evaluate(target, options=options, timing_runs=0)
    assert set(found.by_kind) == set(TASK.short_kinds)
    assert found.accuracy.total == 36 and found.accuracy.dense >= 32
    assert found.accuracy.pruned >= 0.7 * found.accuracy.dense
