"""The properties that must hold on every family (yopo/README.md), family by family.

One test is one column of the table family x property; ``-k qwen3`` shows one row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, DynamicCache
from zoo import PROMPTS, Specimen

import yopo
from yopo.checkpoint.bake import bake
from yopo.models.layout import LayoutProbe
from yopo.pipeline.verification import random_prompt, verify
from yopo.plans.flops import dense_prefill_flops, prefill_flops, visual_kv_bytes
from yopo.plans.schema import LayerPlan, PruningPlan, full_plan
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference

SEEDS = range(3)
LARGE = (1, 5, 6, "L", 7, 8, 9, 10, 11, 12)


def prompts_of(specimen: Specimen) -> dict[str, dict[str, Any]]:
    rows = PROMPTS | specimen.entry.prompts
    return {name: specimen.inputs(each) for name, each in rows.items()}


# 1. A plan that keeps everything is the stock model.


def test_the_whole_plan_is_the_stock_model(specimen: Specimen) -> None:
    for name, inputs in prompts_of(specimen).items():
        plan = full_plan(specimen.identity, specimen.workload(LARGE))
        usual, oracle = (tiny.logits(each, inputs) for each in (specimen.model, specimen.oracle))
        with pruned(specimen.model, plan):
            found = tiny.logits(specimen.model, inputs)
            said = specimen.generate(specimen.model, inputs)
        tiny.assert_close(found, usual, oracle, inputs["attention_mask"].bool())
        assert torch.equal(said, specimen.generate(specimen.model, inputs)), name


# 2. Any plan: the fast runtime is the reference.


def drawn(specimen: Specimen, seed: int, stored: str, **fixed: Any) -> PruningPlan:
    """A random plan, visual keys and values stored whole, in few bits or as latents."""
    plan = specimen.plan(seed, **fixed)
    if stored == LATENTS and not any(layer.read_heads for layer in plan.layers):
        plan = specimen.plan(seed + 100, **fixed)
    if stored == WHOLE:
        return plan
    return (tiny.in_few_bits if stored == FEW_BITS else tiny.as_latents)(plan, seed)


STORED = WHOLE, FEW_BITS, LATENTS = "whole", "in few bits", "as latents"
storages = pytest.mark.parametrize("stored", STORED)


@pytest.mark.parametrize("stored", [FEW_BITS, LATENTS])
@pytest.mark.parametrize("seed", SEEDS)
def test_prefill_in_few_bits_is_the_reference(specimen: Specimen, seed: int, stored: str) -> None:
    """In float64: where a number lies between two levels, rounding decides on a whole step.

    Every prompt has both storages, and every plan half of the prompts.
    """
    for number, (name, inputs) in enumerate(prompts_of(specimen).items()):
        if (number + seed + STORED.index(stored)) % 2:
            continue
        plan = drawn(specimen, seed, stored)
        where = specimen.text_positions(inputs)
        with reference(specimen.oracle, plan):
            expected = tiny.logits(specimen.oracle, inputs)[where]
        with pruned(specimen.oracle, plan):
            found = tiny.logits(specimen.oracle, inputs)[where]
            recorded = specimen.oracle(**tiny.as_dtype(inputs, torch.float64)).logits[where]
            specimen.oracle.get_decoder().yopo.store_whole()
            whole = tiny.logits(specimen.oracle, inputs)[where]
        scale = expected.abs().max()
        assert (found - expected).abs().max() < 1e-9 * scale, name
        assert (recorded.detach() - expected).abs().max() < 1e-9 * scale, name
        assert torch.allclose(whole, found, rtol=1e-6) == (name == "text"), name


@pytest.mark.parametrize("seed", SEEDS)
def test_prefill_is_the_reference(specimen: Specimen, seed: int) -> None:
    for name, inputs in prompts_of(specimen).items():
        plan = specimen.plan(seed)
        with reference(specimen.model, plan):
            usual = tiny.logits(specimen.model, inputs)
        with reference(specimen.oracle, plan):
            oracle = tiny.logits(specimen.oracle, inputs)
        with pruned(specimen.model, plan):
            found = tiny.logits(specimen.model, inputs)
        where = specimen.text_positions(inputs)
        tiny.assert_close(found, usual, oracle, where)
        dense = tiny.logits(specimen.model, inputs)
        same = torch.allclose(found[where], dense[where], atol=1e-3)
        assert same == (name == "text"), name  # a plan that changes nothing would test nothing


def specified(
    specimen: Specimen,
    plan: PruningPlan,
    inputs: dict[str, Any],
    **options: Any,
) -> torch.Tensor:
    with reference(specimen.oracle, plan):
        return specimen.generate(specimen.oracle, inputs, use_cache=False, **options)


@storages
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
def test_generate_matches_the_reference(specimen: Specimen, beams: int, stored: str) -> None:
    """Beams of every prompt, and with everything stored in every way, but not of each with each."""
    for seed, (name, inputs) in enumerate(prompts_of(specimen).items()):
        if beams > 1 and seed % 3 != STORED.index(stored):
            continue
        if beams > 1 and not tiny.beams_get_their_images(specimen.oracle, inputs):
            continue
        plan = drawn(specimen, seed, stored)
        expected = specified(specimen, plan, inputs, num_beams=beams)
        with pruned(specimen.oracle, plan):
            found = specimen.generate(specimen.oracle, inputs, num_beams=beams)
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("seed", SEEDS)
@storages
def test_a_second_turn_with_a_new_image_continues_the_cache(
    specimen: Specimen, seed: int, stored: str
) -> None:
    plan, cache, oracle = drawn(specimen, seed, stored), DynamicCache(), specimen.oracle
    has_image = (seed + STORED.index(stored)) % 2  # both with every seed and every storage
    first = [1, 5, 6, "A", 7, 8] if has_image else [1, 5, 6]
    second = [11, "B", 12, 13]
    with pruned(oracle, plan):
        said = specimen.generate(oracle, specimen.inputs([first]), past_key_values=cache)
        answer = said[0, specimen.inputs([first])["input_ids"].shape[1] :].tolist()
        whole = specimen.inputs([[*first, *answer, *second]])
        turn = specimen.entry.next_turn(oracle, whole, specimen.new_images(whole, second))
        found = specimen.generate(oracle, turn, past_key_values=cache)
    assert torch.equal(found, specified(specimen, plan, whole))
    assert cache.get_seq_length() == found.shape[1] - 1  # the last token was never fed back


# 3 and 4. A baked checkpoint: dense in stock transformers, pruned in yopo, in both key layouts.


@pytest.fixture(scope="module", params=["hub layout", "module names"])
def baked(request: pytest.FixtureRequest, specimen: Specimen, tmp_path_factory) -> tuple:
    """Return (baked directory, plan, specimen)."""
    folder = tmp_path_factory.mktemp("baked")
    is_hub = request.param == "hub layout"
    specimen.model.save_pretrained(folder / "source", save_original_format=is_hub)
    fixed = {"workload": specimen.workload(LARGE), "compensation": "mean", "baked": False}
    plan = specimen.plan(7, **fixed)
    bake(plan, folder / "source", folder / "out")
    return folder / "out", plan, specimen


def check_stock(path: Path, specimen: Specimen) -> None:
    inputs = specimen.inputs(PROMPTS["padded, different images"])
    stock, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not hasattr(stock.get_decoder(), "yopo")
    usual, oracle = (tiny.logits(each, inputs) for each in (specimen.model, specimen.oracle))
    found = tiny.logits(stock, inputs)
    tiny.assert_close(found, usual, oracle, inputs["attention_mask"].bool())
    assert not torch.equal(found, usual)  # it is in another order


def test_a_baked_model_in_stock_transformers_is_the_original(baked: tuple) -> None:
    path, _, specimen = baked
    check_stock(path, specimen)


@pytest.mark.parametrize("how", ["yopo.load", "trust_remote_code"])
def test_a_baked_and_loaded_model_equals_one_pruned_in_memory(baked: tuple, how: str) -> None:
    path, plan, specimen = baked
    if how == "yopo.load":
        model = yopo.load(path)
    else:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, trust_remote_code=True, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["mismatched_keys"]
    inputs = specimen.inputs(PROMPTS["padded, different images"])
    with pruned(specimen.model, plan):
        usual = tiny.logits(specimen.model, inputs)
        said = specimen.generate(specimen.model, inputs)
    with pruned(specimen.oracle, plan):
        oracle = tiny.logits(specimen.oracle, inputs)
    where = specimen.text_positions(inputs)
    tiny.assert_close(tiny.logits(model, inputs), usual, oracle, where)
    assert torch.equal(specimen.generate(model, inputs), said)


@pytest.mark.parametrize("stored", [FEW_BITS, LATENTS])
def test_baked_in_few_bits_is_pruned_in_memory(
    specimen: Specimen, stored: str, tmp_path: Path
) -> None:
    fixed = {"workload": specimen.workload(LARGE), "compensation": "refit", "baked": False}
    plan = drawn(specimen, 7, stored, **fixed)
    specimen.model.save_pretrained(tmp_path / "source")
    bake(plan, tmp_path / "source", tmp_path / "out")
    baked = yopo.read_plan(tmp_path / "out" / "yopo_plan.yaml")
    dense = tiny.exact(AutoModelForImageTextToText.from_pretrained(tmp_path / "out"))
    inputs = specimen.inputs(PROMPTS["padded, different images"])
    where = specimen.text_positions(inputs)
    with pruned(specimen.oracle, plan):
        expected = tiny.logits(specimen.oracle, inputs)[where]
    with pruned(dense, baked, check=False):
        found = tiny.logits(dense, inputs)[where]
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    loaded = yopo.load(tmp_path / "out")
    with torch.no_grad():
        cache = loaded(**specimen.inputs([LARGE]), use_cache=True).past_key_values
    held = sum(layer.visual_bytes() for layer in cache.layers)
    assert held == visual_kv_bytes(plan, itemsize=4)
    assert visual_kv_bytes(plan) < visual_kv_bytes(specimen.plan(7, **fixed))
    verify(tmp_path / "out", tmp_path / "source", plan)


def test_verify_compares_both_checkpoints(baked: tuple) -> None:
    """This is what ``yopo apply --verify`` does, with the family's own inputs of noise."""
    path, plan, specimen = baked
    inputs = random_prompt(specimen.model, plan)
    assert 0 < (~specimen.text_positions(inputs)).sum() < inputs["input_ids"].numel()
    found = verify(path, path.parent / "source", plan)
    assert found.dense.relative <= found.tolerance and found.pruned.relative <= found.tolerance


# 5. FLOPs and bytes are those that flops.py predicts.


def executed(specimen: Specimen, inputs: dict[str, Any]) -> int:
    """Return the matrix-product FLOPs of the text decoder in one forward.

    Without the table of cosines and sines, which older transformers make by a product.
    """
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        tiny.logits(specimen.model, inputs)
    modules = dict(specimen.model.named_modules())
    decoder = specimen.model.get_decoder()
    (name,) = (name for name, module in modules.items() if module is decoder)
    found = counter.get_flop_counts()
    (counts,) = (each for key, each in found.items() if key.endswith(name))
    tables = (each for key, each in found.items() if key.endswith(f"{name}.rotary_emb"))
    return sum(counts.values()) - sum(sum(each.values()) for each in tables)


def test_flops_of_the_dense_model_are_the_predicted_ones(specimen: Specimen) -> None:
    predicted = dense_prefill_flops(specimen.identity.shape, specimen.workload(LARGE))
    assert executed(specimen, specimen.inputs([LARGE])) == pytest.approx(predicted, rel=0.01)


@storages
@pytest.mark.parametrize("seed", SEEDS)
def test_flops_and_bytes_are_the_predicted_ones(specimen: Specimen, seed: int, stored: str) -> None:
    inputs = specimen.inputs([LARGE])
    plan = drawn(specimen, seed, stored, workload=specimen.workload(LARGE))
    with pruned(specimen.model, plan):
        assert executed(specimen, inputs) == pytest.approx(prefill_flops(plan), rel=0.01)
        with torch.no_grad():
            cache = specimen.model(**inputs, use_cache=True).past_key_values
    held = sum(layer.visual_bytes() for layer in cache.layers)
    assert held == visual_kv_bytes(plan, itemsize=4)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_flops_count_the_text_between_and_inside_images(
    specimen: Specimen, bidirectional: bool
) -> None:
    """Of several images with text in between, and of a video's frames with time stamps."""
    shape = specimen.identity.shape
    heads = tuple(range(shape.heads))
    for row in ([1, 5, "L", 6, 7, 8, 9, 2, 3, "A", 4, 3, 5, 6, "L", 7, 8, 9], [1, 5, "V", 6]):
        if any(each not in specimen.entry.pictures for each in row if isinstance(each, str)):
            continue
        layers = [
            LayerPlan(heads, attend_heads=heads, radius=radius, neurons=0)
            for radius in (None, 1, None, 1)
        ]
        plan = specimen.plan(
            0,
            layers=tuple(layers),
            workload=specimen.workload(row),
            bidirectional=bidirectional,
            compensation="none",
        )
        with pruned(specimen.model, plan):
            found = executed(specimen, specimen.inputs([row]))
        assert found == prefill_flops(plan)


# 6. Leaving the block restores the model bit for bit.


def test_the_model_is_restored_bit_for_bit(specimen: Specimen) -> None:
    model = specimen.model
    inputs = specimen.inputs(PROMPTS["two images"])
    before = tiny.logits(model, inputs)
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"):
        with pruned(model, specimen.plan(0)):
            tiny.logits(model, inputs)
            raise RuntimeError("on purpose")
    assert torch.equal(tiny.logits(model, inputs), before)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], each) for name, each in weights.items())
    assert [type(module) for module in model.modules()] == classes
    assert not model.base_model._forward_pre_hooks and not model.base_model._forward_hooks
    assert not [name for name in vars(model.base_model) if name.startswith(("get_", "_yopo"))]


# Images are where the family says, also inside generate.


def test_grids_are_found_in_forward_generate_and_beams(specimen: Specimen) -> None:
    rows = [[1, 5, "A", "B", 6], [1, "L", 4, 5, 6, 7]]
    expected = tuple(specimen.workload(row).grids for row in rows)
    seen: list[Any] = []
    inputs = specimen.inputs(rows)
    by_beam = tiny.beams_get_their_images(specimen.model, inputs)
    token_ids = specimen.family.token_ids(specimen.model.config)
    probe = LayoutProbe(specimen.model.base_model, specimen.family.grids_of, token_ids)
    handle = specimen.model.get_decoder().register_forward_pre_hook(
        lambda *_: seen.append(probe.layout and probe.layout.grids)
    )
    try:
        tiny.logits(specimen.model, inputs)
        specimen.generate(specimen.model, inputs, max_new_tokens=2, min_new_tokens=2)
        if by_beam:
            once = {"max_new_tokens": 1, "min_new_tokens": 1}
            specimen.generate(specimen.model, inputs, **once, num_beams=2)
    finally:
        handle.remove()
        probe.remove()
    beams = (expected[0], expected[0], expected[1], expected[1])
    assert seen == [expected, expected, None, *([beams] if by_beam else [])]


def test_without_images_nothing_is_pruned(specimen: Specimen, capsys: Any, recwarn: Any) -> None:
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    plan = specimen.plan(0, layers=(none,) * 4)
    inputs = specimen.inputs(PROMPTS["text"])
    usual, oracle = (tiny.logits(each, inputs) for each in (specimen.model, specimen.oracle))
    with pruned(specimen.model, plan):
        found = tiny.logits(specimen.model, inputs)
    tiny.assert_close(found, usual, oracle, inputs["attention_mask"].bool())
    assert capsys.readouterr() == ("", "") and not recwarn.list
