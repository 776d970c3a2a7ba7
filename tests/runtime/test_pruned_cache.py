"""The cache of a pruned model has the predicted bytes, and refuses what it cannot do."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import PICTURE, Subject
from transformers import DynamicCache

from yopo.plans.flops import dense_visual_kv_bytes, visual_kv_bytes
from yopo.plans.schema import PruningPlan
from yopo.runtime import reading
from yopo.runtime.cache import PrunedCacheLayer
from yopo.runtime.install import pruned
from yopo.support.errors import ModelError

ONE = tiny.batch([[1, 5, 6, *PICTURE, 7, 8]])
TWO_ROWS = tiny.batch([[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 7, 8, 9, 10]])
NEXT = {"input_ids": torch.tensor([[9]])}


@torch.no_grad()
def filled(subject: Subject, inputs: dict[str, torch.Tensor]) -> DynamicCache:
    return subject.model(**tiny.as_dtype(inputs, subject.model.dtype)).past_key_values


LATENTS = "as latents"

storages = pytest.mark.parametrize("stored", ["whole", "in few bits", LATENTS])


def drawn(subject: Subject, seed: int, stored: str) -> PruningPlan:
    plan = subject.random_plan(seed)
    if stored == "whole":
        return plan
    return (tiny.as_latents if stored == LATENTS else tiny.in_few_bits)(plan, seed)


def visual_bytes(cache: DynamicCache) -> int:
    return sum(layer.visual_bytes() for layer in cache.layers)


@storages
@pytest.mark.parametrize("seed", range(5))
def test_cached_visual_bytes_are_the_predicted_ones(
    subject: Subject, seed: int, stored: str
) -> None:
    plan = drawn(subject, seed, stored)
    predicted = visual_kv_bytes(plan, itemsize=4)
    with torch.no_grad(), pruned(subject.model, plan):
        assert visual_bytes(filled(subject, TWO_ROWS)) == 2 * predicted
        cache = filled(subject, ONE)
        assert visual_bytes(cache) == predicted
        for step in range(1, 4):
            subject.model(**NEXT, past_key_values=cache)
            assert visual_bytes(cache) == predicted
            assert cache.get_seq_length() == ONE["input_ids"].shape[1] + step
    assert predicted <= dense_visual_kv_bytes(subject.shape, plan.workload, itemsize=4)


def test_the_stock_cache_has_the_predicted_dense_bytes(subject: Subject) -> None:
    workload = tiny.workload()
    dense = filled(subject, ONE)
    share = workload.visual / ONE["input_ids"].shape[1]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    predicted = dense_visual_kv_bytes(subject.shape, workload, itemsize=4)
    assert predicted == round(held * share)
    plan = subject.random_plan(1)
    assert visual_kv_bytes(plan, itemsize=4) < predicted
    with pruned(subject.model, tiny.whole(subject)):
        assert visual_bytes(filled(subject, ONE)) == predicted


@storages
@pytest.mark.parametrize("seed", range(3))
def test_a_dropped_layer_holds_only_text(subject: Subject, seed: int, stored: str) -> None:
    """This is not only reported: the actual buffers are no longer than their tokens."""
    plan = drawn(subject, seed, stored)
    with pruned(subject.model, plan):
        cache = filled(subject, ONE)
    text = ONE["input_ids"].shape[1] - len(PICTURE)
    for layer, layer_plan in zip(cache.layers, plan.layers, strict=True):
        kept = layer_plan.kept_kv(subject.shape)
        if kept:
            held = text if layer_plan.latent_bits else text + len(PICTURE)
            assert layer.kept[0].shape[1:3] == (len(kept), held)
            assert layer.has_latent == (layer_plan.latent_bits is not None)
        if len(kept) < subject.shape.kv_heads:
            others = subject.shape.kv_heads - len(kept)
            assert layer.other[0].shape[1:3] == (others, text)


def test_generate_reports_the_logical_length(mha: Subject) -> None:
    plan = mha.random_plan(2)
    with pruned(mha.model, plan):
        cache = DynamicCache()
        said = mha.model.generate(
            **ONE, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    assert all(type(layer) is PrunedCacheLayer for layer in cache.layers)
    assert cache.get_seq_length() == said.shape[1] - 1  # the last token was never fed back


@torch.no_grad()
def test_decoding_makes_keys_of_latents_block_by_block(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = drawn(subject, 2, LATENTS)
    blocks, spans = [], reading._Latents.spans
    monkeypatch.setattr(
        reading._Latents,
        "spans",
        lambda *args: (blocks.append(each) or each for each in spans(*args)),
    )
    found = []
    with pruned(subject.oracle, plan):
        for size in (1 << 20, 1):
            monkeypatch.setattr(reading, "BLOCK_BYTES", size)
            cache = filled_exactly(subject)
            found.append(subject.oracle(**NEXT, past_key_values=cache).logits)
            many = torch.tensor([[9, *range(20, 30)]])
            cache = filled_exactly(subject)
            together = subject.oracle(input_ids=many, past_key_values=cache).logits[:, :1]
            found.append(together)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-9, atol=1e-9)
    layers = sum(each.latent_bits is not None for each in plan.layers)
    assert len(blocks) == layers * (1 + len(PICTURE))


def filled_exactly(subject: Subject) -> DynamicCache:
    return subject.oracle(**tiny.as_dtype(ONE, torch.float64)).past_key_values


@storages
@torch.no_grad()
def test_cropping_removes_text(subject: Subject, stored: str) -> None:
    plan = drawn(subject, 2, stored)
    with pruned(subject.model, plan):
        cache = filled(subject, ONE)
        expected = subject.model(**NEXT, past_key_values=cache).logits
        subject.model(input_ids=torch.tensor([[20, 21, 22]]), past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == ONE["input_ids"].shape[1]
        cache.crop(0)
        again = subject.model(**NEXT, past_key_values=cache).logits
    torch.testing.assert_close(again, expected)


def test_cropping_into_an_image_is_refused(subject: Subject) -> None:
    plan = subject.random_plan(2)
    with pruned(subject.model, plan):
        cache = filled(subject, ONE)
        with pytest.raises(ModelError, match="into an image"):
            cache.crop(-3)
        assert cache.get_seq_length() == ONE["input_ids"].shape[1]
        with pytest.raises(ModelError, match="into an image"):
            cache.crop(-ONE["input_ids"].shape[1])


@storages
@torch.no_grad()
def test_cache_rows_can_be_selected_repeated_and_reset(subject: Subject, stored: str) -> None:
    plan = drawn(subject, 2, stored)
    step = {"input_ids": torch.tensor([[9], [11]])}
    mask = torch.cat([TWO_ROWS["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    with pruned(subject.model, plan):
        expected = subject.model(
            **step, attention_mask=mask, past_key_values=filled(subject, TWO_ROWS)
        ).logits
        cache = filled(subject, TWO_ROWS)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        swapped = {"input_ids": step["input_ids"].flip(0), "attention_mask": mask.flip(0)}
        found = subject.model(**swapped, past_key_values=cache).logits
        torch.testing.assert_close(found.flip(0), expected)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = subject.model(**TWO_ROWS, past_key_values=cache).logits
        torch.testing.assert_close(again, tiny.logits(subject.model, TWO_ROWS))


@torch.no_grad()
def test_a_cache_of_the_dense_model_is_not_continued(mha: Subject) -> None:
    cache = filled(mha, ONE)
    plan = mha.random_plan(2)
    with pruned(mha.model, plan), pytest.raises(ModelError, match="by the dense model"):
        mha.model(**NEXT, past_key_values=cache)


@torch.no_grad()
def test_the_dense_model_does_not_continue_a_pruned_cache(mha: Subject) -> None:
    plan = mha.random_plan(2)
    with pruned(mha.model, plan):
        cache = filled(mha, ONE)
    with pytest.raises(ModelError, match="cannot serve the dense one"):
        mha.model(**NEXT, past_key_values=cache)


@torch.no_grad()
def test_another_plan_does_not_continue_a_pruned_cache(mha: Subject) -> None:
    plan = mha.random_plan(2)
    with pruned(mha.model, plan):
        cache = filled(mha, ONE)
    with pruned(mha.model, tiny.whole(mha)), pytest.raises(ModelError, match="another plan"):
        mha.model(**NEXT, past_key_values=cache)


@torch.no_grad()
def test_another_storage_does_not_continue_a_pruned_cache(mha: Subject) -> None:
    plan = mha.random_plan(2)
    with pruned(mha.model, plan):
        cache = filled(mha, ONE)
    stored = tiny.in_few_bits(plan, 2)
    with pruned(mha.model, stored), pytest.raises(ModelError, match="another plan"):
        mha.model(**NEXT, past_key_values=cache)


def test_gradients_reach_what_is_stored_in_few_bits(subject: Subject) -> None:
    """As if nothing were rounded; and a cache that was filled so goes on without gradients."""
    plan = drawn(subject, 2, "in few bits")
    with pruned(subject.oracle, plan):
        inputs = tiny.as_dtype(ONE, torch.float64)
        recorded = subject.oracle(**inputs)
        grads = torch.autograd.grad(
            recorded.logits.square().sum(),
            [each.self_attn.k_proj.weight for each in subject.oracle.get_decoder().layers],
        )
        assert all(each.isfinite().all() and each.any() for each in grads)
        with torch.no_grad():
            packed = subject.oracle(**inputs)
            expected, found = (
                subject.oracle(**NEXT, past_key_values=each.past_key_values).logits
                for each in (packed, recorded)
            )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_refused_forward_leaves_the_cache_usable(mha: Subject) -> None:
    plan = mha.random_plan(2)
    with pruned(mha.model, plan):
        expected = mha.model(**NEXT, past_key_values=filled(mha, ONE)).logits
        cache = filled(mha, ONE)
        with pytest.raises(ModelError, match="attention mask"):
            mha.model(**NEXT, attention_mask=torch.ones(1, 3), past_key_values=cache)
        assert torch.equal(mha.model(**NEXT, past_key_values=cache).logits, expected)
