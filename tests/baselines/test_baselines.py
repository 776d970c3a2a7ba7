"""Baselines equal the stock model if they drop nothing, and independent oracles if they do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny import EOS, IMAGE, PICTURE, Subject
from torch.nn.functional import adaptive_avg_pool2d
from transformers import DynamicCache

from yopo.baselines.downsample import Downsampling
from yopo.baselines.fastv import FastV
from yopo.baselines.install import baseline
from yopo.baselines.masked import MaskedPlan
from yopo.baselines.random import RandomTokens
from yopo.baselines.registry import BASELINES
from yopo.baselines.vtw import TokenWithdrawal
from yopo.models.answer_tokens import teacher_forced
from yopo.plans.schema import LayerPlan
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference
from yopo.support.errors import ModelError, PlanError

LAYERS, VISUAL = 4, tiny.SIDE**2
ONE = [[1, 5, 6, *PICTURE, 7, 8, 9, 10]]
PROMPTS = {
    "one image": ONE,
    "two images": [[1, 5, *PICTURE, 6, *PICTURE, 7, 8]],
    "padded": [[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, 9, 11, 12, 13, 14]],
}
SOME = {
    "vtw": TokenWithdrawal(2),
    "fastv": FastV(2, share=0.4),
    "downsample": Downsampling(scale=(0.5, 0.75)),
    "random": RandomTokens(1, share=0.4),
}
NOTHING = {
    "vtw": TokenWithdrawal(LAYERS),
    "fastv": FastV(2, share=1.0),
    "downsample": Downsampling(),
    "random": RandomTokens(0, share=1.0),
}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    return tiny.batch(PROMPTS[name])


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    return model.generate(**inputs, suppress_tokens=[IMAGE], **settings)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", NOTHING)
def test_dropping_nothing_is_the_stock_model(subject: Subject, name: str, prompt: str) -> None:
    inputs = inputs_of(prompt)
    usual, oracle = (tiny.logits(each, inputs) for each in (subject.model, subject.oracle))
    said = generated(subject.model, inputs)
    with baseline(subject.model, NOTHING[name]):
        found = tiny.logits(subject.model, inputs)
        assert torch.equal(generated(subject.model, inputs), said)
    tiny.assert_close(found, usual, oracle, tiny.real(inputs))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("layers", range(LAYERS))
def test_withdrawal_is_the_plan_of_whole_then_empty_layers(
    subject: Subject, layers: int, prompt: str
) -> None:
    shape, inputs = subject.shape, inputs_of(prompt)
    whole = LayerPlan(
        tuple(range(shape.heads)),
        attend_heads=tuple(range(shape.heads)),
        radius=None,
        neurons=shape.ffn,
    )
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    layer_plans = (whole,) * layers + (none,) * (LAYERS - layers)
    plan = subject.random_plan(0, layers=layer_plans, compensation="none", bidirectional=False)
    with pruned(subject.model, plan):
        usual, said = tiny.logits(subject.model, inputs), generated(subject.model, inputs)
    with pruned(subject.oracle, plan, check=False):
        oracle = tiny.logits(subject.oracle, inputs)
    with baseline(subject.model, TokenWithdrawal(layers)):
        found = tiny.logits(subject.model, inputs)
        assert torch.equal(generated(subject.model, inputs), said)
    tiny.assert_close(found, usual, oracle, tiny.real_text(inputs))


@torch.no_grad()
def brute_fastv(model: Any, inputs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """Compute logits by eager attention over everything, with dropped tokens masked as keys."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    shown = eager(**inputs, output_attentions=True)
    last = shown.attentions[1][:, :, -1].mean(dim=1)  # (batch, keys): rows are left-padded
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    score = last.masked_fill(ids != IMAGE, -1.0)
    gone = (ids == IMAGE).scatter(1, score.topk(count, dim=1).indices, False)
    real = inputs["attention_mask"].bool()
    masks = []
    for number in range(LAYERS):
        keys = real & ~gone if number >= 2 else real
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & keys[:, None]
        allowed = allowed | torch.eye(length, dtype=torch.bool)
        lowest = torch.zeros(allowed.shape, dtype=eager.dtype)
        masks.append(lowest.masked_fill(~allowed, torch.finfo(eager.dtype).min)[:, None])
    for layer, mask in zip(eager.get_decoder().layers, masks, strict=True):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}),
            with_kwargs=True,
        )
    return eager(**inputs).logits


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_fastv_is_eager_attention_without_the_dropped_keys(
    subject: Subject, share: float, prompt: str
) -> None:
    inputs = inputs_of(prompt)
    count = int(share * (inputs["input_ids"][0] == IMAGE).sum())
    usual = brute_fastv(subject.model, inputs, count)
    oracle = brute_fastv(subject.oracle, tiny.as_dtype(inputs, torch.float64), count)
    with baseline(subject.model, FastV(2, share=share)):
        found = tiny.logits(subject.model, inputs)
    tiny.assert_close(found, usual, oracle, tiny.real_text(inputs))


def test_fastv_ranks_each_sample_by_its_own_question(mha: Subject) -> None:
    """The same image keeps different tokens under two questions."""
    rows = [[1, 5, *PICTURE, 7, 8, 9, 10], [1, 5, *PICTURE, 40, 41, 42, 43]]
    inputs = tiny.batch(rows)
    inputs["pixel_values"] = tiny.pictures(1).repeat(2, 1, 1, 1)
    with torch.no_grad(), baseline(mha.model, FastV(2, share=0.25)):
        cache = mha.model(**inputs, use_cache=True).past_key_values
    places = cache.layers[2].record.stretch(2).places
    assert places.shape == (2, 6 + VISUAL // 4)
    assert not torch.equal(*places)


@torch.no_grad()
def hand_shortened(model: Any, inputs: dict[str, torch.Tensor], side: int, smaller: tuple) -> Any:
    """Run the stock decoder on embeddings whose image was pooled by hand; one image, one row."""
    ids = inputs["input_ids"][0]
    features = model.base_model.get_image_features(
        inputs["pixel_values"].to(model.dtype), return_dict=True
    ).pooler_output[0]
    picture = features.reshape(side, side, -1).permute(2, 0, 1)[None]
    pooled = adaptive_avg_pool2d(picture, smaller)[0].flatten(1).T
    words = model.get_input_embeddings()(ids)
    start = int((ids == IMAGE).nonzero()[0])
    parts = [words[:start], pooled, words[start + side**2 :]]
    embeds = torch.cat(parts)[None]
    hidden = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
    return model.lm_head(hidden)[0, start + smaller[0] * smaller[1] :]


def test_downsampling_is_the_stock_model_on_a_shorter_prompt(subject: Subject) -> None:
    inputs = tiny.batch(ONE)
    sizes = (inputs, tiny.SIDE, (2, 3))
    usual, oracle = hand_shortened(subject.model, *sizes), hand_shortened(subject.oracle, *sizes)
    with baseline(subject.model, SOME["downsample"]):
        found = tiny.logits(subject.model, inputs)[:, -4:]
        with torch.no_grad():
            cache = subject.model(**inputs, use_cache=True).past_key_values
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    tiny.assert_close(found, usual[None], oracle[None], everywhere)
    assert {layer.keys.shape[2] for layer in cache.layers} == {7 + 2 * 3}
    assert cache.get_seq_length() == len(ONE[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_mask_simulation_matches_the_reference(
    subject: Subject, prompt: str, seed: int
) -> None:
    plan = subject.random_plan(seed, compensation=("none", "mean")[seed % 2])
    inputs = inputs_of(prompt)
    with reference(subject.model, plan):
        usual = tiny.logits(subject.model, inputs)
        said = generated(subject.model, inputs, use_cache=False)
    with reference(subject.oracle, plan, check=False):
        oracle = tiny.logits(subject.oracle, inputs)
    with baseline(subject.model, "masked", plan):
        found = tiny.logits(subject.model, inputs)
        assert torch.equal(generated(subject.model, inputs), said)
    tiny.assert_close(found, usual, oracle, tiny.real_text(inputs))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", BASELINES)
def test_generate_matches_teacher_forcing(subject: Subject, name: str, prompt: str) -> None:
    """Decode steps see the same as one forward of prompt and answer."""
    model, inputs = subject.model, inputs_of(prompt)
    plan = subject.random_plan(1)
    with torch.no_grad(), baseline(model, SOME.get(name, name), plan):
        length = inputs["input_ids"].shape[1]
        whole = generated(model, inputs)
        more = torch.ones(len(whole), whole.shape[1] - length, dtype=torch.int64)
        mask = torch.cat([inputs["attention_mask"], more], dim=1)
        answers = torch.zeros_like(whole, dtype=torch.bool)
        answers[:, length:] = True
        with teacher_forced(answers):
            forced = model(**{**inputs, "input_ids": whole, "attention_mask": mask}).logits
    forced[..., [IMAGE, EOS]] = float("-inf")  # both are suppressed
    assert torch.equal(forced[:, length - 1 : -1].argmax(dim=-1), whole[:, length:])


@pytest.mark.parametrize("name", SOME)
def test_padding_changes_nothing(subject: Subject, name: str) -> None:
    """A single row equals that row of a padded batch, and the cache holds none of its padding."""
    inputs, rows = inputs_of("padded"), PROMPTS["padded"]
    with baseline(subject.model, SOME[name]):
        together, said = tiny.logits(subject.model, inputs), generated(subject.model, inputs)
        for number, row in enumerate(rows):
            alone = tiny.batch([row])
            alone["pixel_values"] = inputs["pixel_values"][number : number + 1]
            found = tiny.logits(subject.model, alone)[0, -2:]
            assert torch.allclose(together[number, -2:], found, atol=1e-4)
            assert torch.equal(said[number, -6:], generated(subject.model, alone)[0, -6:])


def test_dropped_tokens_are_in_no_later_cache(subject: Subject) -> None:
    inputs, shape = tiny.batch(ONE), subject.shape
    token = 2 * shape.kv_heads * shape.head_dim * 4
    expected = {
        "vtw": [VISUAL, VISUAL, 0, 0],
        "fastv": [VISUAL, VISUAL, int(0.4 * VISUAL), int(0.4 * VISUAL)],
        "downsample": [6] * 4,
        "random": [VISUAL, *[int(0.4 * VISUAL)] * 3],
    }
    for name, counts in expected.items():
        with torch.no_grad(), baseline(subject.model, SOME[name]):
            cache = subject.model(**inputs, use_cache=True).past_key_values
            assert [layer.visual_bytes() for layer in cache.layers] == [n * token for n in counts]
            assert [layer.keys.shape[2] for layer in cache.layers] == [7 + n for n in counts]
            step = torch.tensor([[9]])
            cache = subject.model(input_ids=step, past_key_values=cache).past_key_values
            assert [layer.visual_bytes() for layer in cache.layers] == [n * token for n in counts]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", BASELINES)
def test_the_model_is_restored_bit_for_bit(mha: Subject, name: str, fails: bool) -> None:
    model, inputs = mha.model, inputs_of("two images")
    plan = mha.random_plan(2)
    before, state = tiny.logits(model, inputs), trace(model)
    with pytest.raises(ZeroDivisionError) if fails else torch.no_grad():
        with baseline(model, SOME.get(name, name), plan):
            assert not torch.equal(tiny.logits(model, inputs), before)
            if fails:
                raise ZeroDivisionError
    assert torch.equal(tiny.logits(model, inputs), before)
    assert trace(model) == state


def trace(model: Any) -> tuple[object, ...]:
    """Return everything that a baseline might leave on a model."""
    modules = list(model.modules())
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules]
    attributes = [set(vars(each)) for each in (model.base_model, model.get_decoder())]
    return [type(each) for each in modules], hooks, attributes, list(model.state_dict())


@pytest.mark.parametrize("name", ["fastv", "downsample", "masked"])
def test_hooks_of_accelerate_stay_around_the_forward(mha: Subject, name: str) -> None:
    model, inputs, plan = copy.deepcopy(mha.model), inputs_of("two images"), mha.random_plan(2)
    decoder, usual = model.get_decoder(), tiny.logits(model, inputs)
    with baseline(model, SOME.get(name, name), plan):
        expected = tiny.logits(model, inputs)
    add_hook_to_module(decoder, ModelHook())
    held = {slot: vars(decoder)[slot] for slot in ("forward", "_old_forward")}
    with baseline(model, SOME.get(name, name), plan):
        assert torch.equal(tiny.logits(model, inputs), expected)
    assert {slot: vars(decoder)[slot] for slot in held} == held
    assert torch.equal(tiny.logits(model, inputs), usual)


def test_a_forward_that_would_be_bypassed_is_refused(mha: Subject) -> None:
    model = copy.deepcopy(mha.model)
    decoder = model.get_decoder()
    decoder.forward = torch.compile(decoder.forward, backend="eager")
    state = trace(model)
    with pytest.raises(ModelError, match="was replaced"), baseline(model, SOME["vtw"]):
        pass
    assert trace(model) == state


def test_text_only_input_gives_the_stock_model(mha: Subject) -> None:
    inputs = tiny.batch([[1, 5, 6, 7], [2, 3]])
    usual, said = tiny.logits(mha.model, inputs), generated(mha.model, inputs)
    plan = mha.random_plan(2)
    for name in BASELINES:
        with baseline(mha.model, SOME.get(name, name), plan):
            found = tiny.logits(mha.model, inputs)
            assert torch.equal(generated(mha.model, inputs), said)
        assert torch.allclose(found[tiny.real(inputs)], usual[tiny.real(inputs)], atol=1e-4)


def test_eager_attention_gets_additive_masks(mha: Subject) -> None:
    inputs, eager = inputs_of("padded"), copy.deepcopy(mha.model)
    eager.set_attn_implementation("eager")
    plan = mha.random_plan(1)
    for name in BASELINES:
        found = []
        for model in (mha.model, eager):
            with baseline(model, SOME.get(name, name), plan):
                found.append(tiny.logits(model, inputs)[tiny.real_text(inputs)])
                said = generated(model, inputs)
        assert torch.allclose(*found, atol=1e-4) and said.shape[1] > inputs["input_ids"].shape[1]


def forward(model: Any, rows: list[list[int]], **more: Any) -> None:
    with torch.no_grad():
        model(**tiny.batch(rows), **more)


def used_cache(model: Any) -> DynamicCache:
    with torch.no_grad():
        return model(**tiny.batch(ONE), use_cache=True).past_key_values


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "counts": (lambda m: forward(m, [ONE[0], [1, *PICTURE, *PICTURE, 3]]), "the same number"),
    "none": (lambda m: forward(m, [ONE[0], [1, 2, 3]]), "the same number"),
    "beams": (lambda m: generated(m, tiny.batch(ONE), num_beams=2), "only grows"),
    "end": (lambda m: forward(m, [[1, 5, *PICTURE]]), "ends in an image"),
    "end, right-padded": (
        lambda m: m(**tiny.batch([[1, 5, *PICTURE], [1, 5, *PICTURE, 3]], pad="right")),
        "ends in an image",
    ),
    "attentions": (lambda m: forward(m, ONE, output_attentions=True), "attentions"),
    "turns": (lambda m: second_image(m), "first turn"),
}


def second_image(model: Any) -> None:
    cache, turn = used_cache(model), tiny.batch([[3, *PICTURE, 4]])
    with torch.no_grad():
        model(input_ids=turn["input_ids"], pixel_values=turn["pixel_values"], past_key_values=cache)


@pytest.mark.parametrize("case", REFUSED)
def test_a_baseline_refuses_what_it_cannot_do(mha: Subject, case: str) -> None:
    call, expected = REFUSED[case]
    with baseline(mha.model, SOME["fastv"]), pytest.raises(ModelError, match=expected):
        call(mha.model)


def test_a_cache_cannot_be_used_by_another_model(mha: Subject) -> None:
    model, step = mha.model, torch.tensor([[9]])
    dense = used_cache(model)
    with torch.no_grad(), baseline(model, SOME["vtw"]):
        theirs = used_cache(model)
        with pytest.raises(ModelError, match="another model"):
            model(input_ids=step, past_key_values=dense)
    with torch.no_grad(), pytest.raises(ModelError, match="another model"):
        model(input_ids=step, past_key_values=theirs)
    with torch.no_grad(), baseline(model, SOME["vtw"]), pytest.raises(ModelError, match="another"):
        model(input_ids=step, past_key_values=theirs)


def test_ranking_needs_a_preceding_layer() -> None:
    with pytest.raises(PlanError, match="fastv cannot drop tokens after 0 layers"):
        FastV(0, share=0.5)
    assert FastV(2, share=0.5).on_layers((2, 3)) == FastV(1, share=0.5)


def test_only_one_change_may_be_installed_at_a_time(mha: Subject) -> None:
    with baseline(mha.model, SOME["vtw"]), pytest.raises(ModelError, match="already"):
        with baseline(mha.model, SOME["fastv"]):
            pass
    plan = mha.random_plan(2)
    with pruned(mha.model, plan), pytest.raises(ModelError, match="already"):
        with baseline(mha.model, SOME["fastv"]):
            pass


def test_a_baseline_given_by_name_needs_a_plan(mha: Subject) -> None:
    for which in ("vtw", MaskedPlan()):
        with pytest.raises(PlanError, match="plan"), baseline(mha.model, which):
            pass
    with pytest.raises(PlanError, match="fastvv") as caught:
        with baseline(mha.model, "fastvv", tiny.whole(mha)):
            pass
    assert "fastv" in caught.value.remedy


@pytest.mark.parametrize("name", BASELINES)
def test_several_forwards_equal_one(subject: Subject, name: str) -> None:
    """Steps of one and of several tokens over padded rows act as if all were in one prompt."""
    turns = [PROMPTS["padded"], [[40, 41, 42], [50, 51]], [[43], [52]], [[44, 45], [53, 54]]]
    parts = [tiny.batch(rows) for rows in turns]
    plan = subject.random_plan(1)
    with torch.no_grad(), baseline(subject.model, SOME.get(name, name), plan):
        cache, found, mask = None, [], []
        for part in parts:
            mask.append(part.pop("attention_mask"))
            done = subject.model(
                **part, attention_mask=torch.cat(mask, 1), past_key_values=cache, use_cache=True
            )
            cache = done.past_key_values
            found.append(done.logits)
        whole = torch.cat([part["input_ids"] for part in parts], dim=1)
        real, length = torch.cat(mask, dim=1), parts[0]["input_ids"].shape[1]
        is_answer = torch.arange(whole.shape[1])[None] >= length
        inputs = {"input_ids": whole, "pixel_values": parts[0]["pixel_values"]}
        with teacher_forced(is_answer.expand_as(whole)):
            once = subject.model(**inputs, attention_mask=real).logits
    where = real.bool() & (whole != IMAGE)
    assert torch.allclose(torch.cat(found, dim=1)[where], once[where], atol=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_a_second_turn_of_text_continues_the_first(mha: Subject, name: str) -> None:
    """``generate`` over a used cache gives the same tokens as when it prefills everything."""
    model, inputs = mha.model, inputs_of("one image")
    plan = mha.random_plan(1)
    with baseline(model, SOME.get(name, name), plan):
        first = generated(model, inputs, return_dict_in_generate=True)
        more = torch.tensor([[30, 31, 32]])
        ids = torch.cat([first.sequences, more], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = generated(model, turn, past_key_values=first.past_key_values)
        forced = torch.zeros_like(second, dtype=torch.bool)
        forced[:, inputs["input_ids"].shape[1] :] = True
        with torch.no_grad(), teacher_forced(forced):
            logits = model(input_ids=second, pixel_values=inputs["pixel_values"]).logits
    logits[..., [IMAGE, EOS]] = float("-inf")
    start = ids.shape[1]
    assert torch.equal(logits[:, start - 1 : -1].argmax(dim=-1), second[:, start:])
