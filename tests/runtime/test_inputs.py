"""Callers may pass embeddings, labels and other ways to prefill along with a prompt."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject
from transformers import DynamicCache

from yopo.plans.schema import LayerPlan, PruningPlan
from yopo.runtime.install import pruned
from yopo.support.errors import ModelError

ROWS = [[1, 5, 6, *PICTURE, 7, 8]]
NO_TOKEN = "embeddings that match no token"
WITHOUT_IMAGES = "image placeholders, but no images"
CONSTANT = "part of the loss is a constant"


def said(found: list[Any], what: str) -> bool:
    return any(what in str(each.message) for each in found)


@torch.no_grad()
def merged(subject: Subject, inputs: dict[str, Any]) -> torch.Tensor:
    """Return embeddings with the image's features merged in."""
    model = subject.model
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
    return embeds.masked_scatter((inputs["input_ids"] == IMAGE)[..., None], features)


@pytest.mark.parametrize("how", ["forward", "generate", "decoder"])
def test_already_merged_features_cause_a_warning(mha: Subject, how: str) -> None:
    plan = mha.random_plan(3)
    embeds = merged(mha, tiny.batch(ROWS))
    with pruned(mha.model, plan), torch.no_grad():
        with pytest.warns(UserWarning, match=f"16 {NO_TOKEN}"):
            if how == "forward":
                mha.model(inputs_embeds=embeds)
            elif how == "generate":
                mha.model.generate(inputs_embeds=embeds, max_new_tokens=2, do_sample=False)
            else:
                mha.model.get_decoder()(inputs_embeds=embeds)


def test_an_already_merged_second_image_is_noticed(mha: Subject) -> None:
    plan = mha.random_plan(3)
    both = tiny.batch([[*ROWS[0], *PICTURE, 9]])
    embeds = merged(mha, both)
    marker = mha.model.get_input_embeddings()(torch.tensor(IMAGE)).detach()
    embeds[:, 3:19] = marker
    with pruned(mha.model, plan), pytest.warns(UserWarning, match=f"16 {NO_TOKEN}"):
        tiny.logits(mha.model, {"inputs_embeds": embeds, "pixel_values": both["pixel_values"][:1]})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_embeddings_are_not_mistaken_for_features(
    subject: Subject, dtype: torch.dtype
) -> None:
    """Covers a prompt of text, placeholders with their pixels, and single steps."""
    model = copy.deepcopy(subject.model).to(dtype)
    plan = subject.random_plan(3, layers=tiny.whole(subject).layers)
    embed = model.get_input_embeddings()
    text = {"inputs_embeds": embed(torch.tensor([[1, 2, 3, 0, 4]])).detach()}
    inputs = tiny.as_dtype(tiny.batch(ROWS), dtype)
    image = {
        "inputs_embeds": embed(inputs["input_ids"]).detach(),
        "pixel_values": inputs["pixel_values"],
    }
    with pruned(model, plan, check=False), torch.no_grad():
        by_ids = model(**inputs).logits
        for each in (text, image):
            model.generate(**each, max_new_tokens=2, do_sample=False)
        assert torch.equal(model(**image).logits, by_ids)
        cache = model(**inputs).past_key_values
        step = torch.randn(1, 1, embed.embedding_dim, dtype=dtype)
        model(inputs_embeds=step, past_key_values=cache)


def test_the_suggested_remedy_works(mha: Subject) -> None:
    """Already encoded images can be passed as encoder outputs, where the warning says so."""
    plan = mha.random_plan(3)
    inputs = tiny.batch(ROWS)
    with pruned(mha.model, plan), pytest.warns(UserWarning, match=NO_TOKEN) as warned:
        mha.model(inputs_embeds=merged(mha, inputs))
    names_it = "mm_encoder_outputs" in str(warned[0].message)
    assert names_it == tiny.takes_encoded(mha.model)
    tiny.skip_unless_takes_encoded(mha.model)
    with pruned(mha.model, plan), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = tiny.logits(mha.model, inputs)
        encoded = mha.model.get_image_features(inputs.pop("pixel_values"))
        found = tiny.logits(mha.model, inputs | {"mm_encoder_outputs": {"image": encoded}})
    assert torch.equal(found, expected)


# Labels.


def dropping(subject: Subject) -> PruningPlan:
    """Make a plan that drops visual tokens before the last layer."""
    full, none = tiny.whole(subject).layers[0], LayerPlan((), (), None, 0)
    plan = subject.random_plan(1, compensation="none", baked=True)
    return plan.with_layers((full, full, none, none))


LABELS = {
    "the whole prompt": ([1, 5, 6, *PICTURE, 7, 8], True),
    "right after the image": ([-100] * 19 + [7, 8], True),
    "on the image": ([-100] * 5 + [98] + [-100] * 15, True),
    "later": ([-100] * 20 + [8], False),
    "before the image, its first token too": ([-100, 5, 6, 98] + [-100] * 17, False),
    "none": ([-100] * 21, False),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("is_dropped", [True, False])
def test_labels_after_dropped_tokens_cause_a_warning(
    mha: Subject, name: str, is_dropped: bool
) -> None:
    labels, asks = LABELS[name]
    plan = dropping(mha) if is_dropped else tiny.whole(mha)
    inputs = tiny.batch(ROWS) | {"labels": torch.tensor([labels])}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pruned(mha.model, plan), torch.no_grad():
            mha.model(**inputs)
            assert said(found, CONSTANT) is (asks and is_dropped)
            count = len(found)
            mha.model(**tiny.batch(ROWS))  # a forward's request does not carry over to the next one
            assert len(found) == count


def test_shifted_labels_and_padded_rows_are_checked_too(mha: Subject) -> None:
    inputs = tiny.batch([*ROWS, [1, *PICTURE, *PICTURE, 4, 5]], pad="right")
    labels = inputs["input_ids"].masked_fill(~tiny.real_text(inputs), -100)
    labels[0, 19] = labels[1, 33] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with pruned(mha.model, dropping(mha)), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        mha.model(**inputs, labels=labels)
        mha.model(**inputs, labels=labels, shift_labels=shifted)
        shifted[1, 32] = 4
        with pytest.raises(UserWarning, match=CONSTANT):
            mha.model(**inputs, labels=labels, shift_labels=shifted)


# Other ways to prefill and to continue.


def test_placeholders_without_images_cause_a_warning_once(mha: Subject) -> None:
    """Not if they follow images, as those that prompt lookup copies do."""
    plan, model = mha.random_plan(3), copy.deepcopy(mha.model)
    inputs = tiny.batch(ROWS)
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}
    dense = tiny.logits(model, without)
    with pruned(model, plan), torch.no_grad(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        cache = model(**inputs).past_key_values
        model(input_ids=torch.tensor([[9, IMAGE, IMAGE]]), past_key_values=cache)
        model.generate(**inputs, max_new_tokens=2)
        model(input_ids=torch.tensor([[1, 2, 3]]))
        assert not said(found, WITHOUT_IMAGES)
        assert torch.allclose(tiny.logits(model, without), dense, atol=1e-4)
        assert said(found, f"16 {WITHOUT_IMAGES}")
        count = len(found)
        model(**without)
        assert len(found) == count


def test_images_in_an_argument_that_is_not_read_cause_the_warning(mha: Subject) -> None:
    """As ``mm_encoder_outputs`` does where a model's forward does not know it yet."""
    model, inputs = copy.deepcopy(mha.model), tiny.batch(ROWS)
    inputs["not_an_argument"] = inputs.pop("pixel_values")
    with pruned(model, mha.random_plan(3)), pytest.warns(UserWarning, match=WITHOUT_IMAGES):
        tiny.logits(model, inputs)


@pytest.mark.parametrize("size", [1, 2, 10, 18])
def test_chunks_that_cut_an_image_are_refused(mha: Subject, size: int) -> None:
    plan = mha.random_plan(3)
    two = tiny.batch([[1, 5, *PICTURE, *PICTURE, 7, 8]])
    tiny.skip_unless_takes_encoded(mha.model)
    with pruned(mha.model, plan):
        if size == 18:  # between the images: nothing is cut
            options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
            expected = mha.model.generate(**two, **options)
            found = mha.model.generate(**two, **options, prefill_chunk_size=size)
            assert torch.equal(found, expected)
            return
        with pytest.raises(ModelError, match="whole number of images"):
            mha.model.generate(**two, max_new_tokens=2, prefill_chunk_size=size)


@pytest.mark.parametrize("size", [2, 10, 18])
def test_chunks_without_their_images_cause_a_warning(mha: Subject, size: int) -> None:
    """Stock transformers before 5.18 cuts prompts into chunks but drops their images."""
    if tiny.takes_encoded(mha.model):
        pytest.skip("this transformers' chunks come with their images")
    model, two = copy.deepcopy(mha.model), tiny.batch([[1, 5, *PICTURE, *PICTURE, 7, 8]])
    with pruned(model, mha.random_plan(3)), pytest.warns(UserWarning, match=WITHOUT_IMAGES):
        model.generate(**two, max_new_tokens=2, prefill_chunk_size=size)


def test_continuous_batching_is_refused_only_while_pruned(mha: Subject) -> None:
    plan = mha.random_plan(3)
    before = sorted(vars(mha.model))
    with pruned(mha.model, plan):
        for call in (mha.model.generate_batch, lambda _: mha.model.init_continuous_batching()):
            with pytest.raises(ModelError, match="no paged attention"):
                call([[1, 2, 3]])
        paged = {"input_ids": torch.tensor([[1, 2]]), "read_index": [torch.tensor([0])]}
        with pytest.raises(ModelError, match="no paged attention"):
            tiny.logits(mha.model, paged)
    assert sorted(vars(mha.model)) == before


@torch.no_grad()
def test_a_copied_cache_is_independent(subject: Subject) -> None:
    plan = subject.random_plan(2)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [IMAGE]}
    prompt = tiny.batch([[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 7, 8, 9, 10]])
    with pruned(subject.model, plan):
        cache = DynamicCache()
        subject.model(**prompt, past_key_values=cache)
        found = []
        for question in ([20, 21], [30, 31]):
            ids = torch.cat([prompt["input_ids"], torch.tensor([question] * 2)], dim=1)
            mask = torch.cat([prompt["attention_mask"], torch.ones(2, 2).long()], dim=1)
            turn = {"input_ids": ids, "attention_mask": mask}
            mine = copy.deepcopy(cache)
            found.append(
                subject.model.generate(**turn, past_key_values=mine, do_sample=False, **options)
            )
            assert cache.get_seq_length() == prompt["input_ids"].shape[1]
            assert mine.get_seq_length() == found[-1].shape[1] - 1
            whole = turn | {"pixel_values": prompt["pixel_values"]}
            expected = subject.model.generate(**whole, do_sample=False, **options)
            assert torch.equal(found[-1], expected)
    assert not torch.equal(*found)


@torch.no_grad()
def test_cropping_by_a_length_is_refused_as_in_stock(mha: Subject) -> None:
    plan = mha.random_plan(2)
    with pruned(mha.model, plan):
        cache = mha.model(**tiny.batch(ROWS)).past_key_values
        with pytest.raises(ModelError, match=r"crop\(2\)"):
            cache.crop(2)
        assert cache.get_seq_length() == 21
