"""In one forward, the whole plan matches the stock model and any plan the reference."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject

from yopo.models.family import GridsOf
from yopo.plans import grid
from yopo.plans.schema import LayerPlan
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference

PROMPTS = {
    "one image": [[1, 5, 6, *PICTURE, 7, 8, 9, 10]],
    "image first": [[*PICTURE, 7, 8]],
    "image last": [[1, 5, *PICTURE]],
    "one text token before": [[1, *PICTURE]],
    "one text token between": [[*PICTURE, 1, *PICTURE]],
    "two images apart": [[1, 5, *PICTURE, 6, 7, *PICTURE, 8, 9]],
    "two images adjacent": [[1, 5, *PICTURE, *PICTURE, 8, 9]],
    "same places, other images": [[1, *PICTURE, 7, 8], [2, *PICTURE, 9, 3]],
    "one image each, padded": [[1, 5, 6, *PICTURE, 7, 8, 9, 10], [1, *PICTURE, 3]],
    "one and two images": [[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, *PICTURE, 9]],
    "a row without image": [[1, 5, 6, *PICTURE, 7, 8, 9, 10], [1, 2, 3]],
    "no image": [[1, 2, 3, 4, 5]],
    "no image, padded": [[1, 2, 3, 4, 5], [6, 7]],
    "one text token": [[1]],
}
GRIDS = {
    "2x8": ([[1, 5, *PICTURE, 7, 8]], tiny.fixed_grids([(2, 8)])),
    "8x2": ([[1, 5, *PICTURE, 7, 8]], tiny.fixed_grids([(8, 2)])),
    "3x5 and 1x1": ([[1, 5, *PICTURE, 7, 8]], tiny.fixed_grids([(3, 5), (1, 1)])),
    "1x16": ([[1, 5, *PICTURE, 7, 8]], tiny.fixed_grids([(1, 16)])),
    "3x7, 5x1 and 2x3": (
        [[1, 5, *PICTURE, *PICTURE, 8, 9]],
        tiny.fixed_grids([(3, 7), (5, 1), (2, 3)]),
    ),
    "other grids per row": (
        [[1, *PICTURE, 7, 8], [2, *PICTURE, 9, 3]],
        tiny.fixed_grids([(2, 8)], [(8, 2)]),
    ),
    "other grids per row, padded": (
        [[1, 5, 6, *PICTURE, 7], [2, *PICTURE, 9, *PICTURE, 3]],
        tiny.fixed_grids([(3, 5), (1, 1)], [(2, 8), (4, 4)]),
    ),
}


def check_plan(
    subject: Subject, seed: int, inputs: dict[str, torch.Tensor], grids_of: GridsOf | None = None
) -> None:
    plan = subject.random_plan(seed)
    with reference(subject.model, plan, grids_of=grids_of):
        usual = tiny.logits(subject.model, inputs)
    with reference(subject.oracle, plan, grids_of=grids_of):
        oracle = tiny.logits(subject.oracle, inputs)
    with pruned(subject.model, plan, grids_of=grids_of):
        found = tiny.logits(subject.model, inputs)
    tiny.assert_close(found, usual, oracle, tiny.real_text(inputs))


@pytest.fixture
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image rows per attention call; by default, a whole tiny image would fit into one."""
    if request.param is not None:
        monkeypatch.setattr(grid, "ROWS_PER_BLOCK", request.param)
        monkeypatch.setattr(grid, "TOKENS_PER_BLOCK", 1)
        monkeypatch.setattr(grid, "TOKENS_PER_SHARED_BLOCK", 5 * request.param)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_whole_plan_is_the_stock_model(subject: Subject, name: str) -> None:
    inputs = tiny.batch(PROMPTS[name])
    usual, oracle = tiny.logits(subject.model, inputs), tiny.logits(subject.oracle, inputs)
    with pruned(subject.model, tiny.whole(subject)):
        found = tiny.logits(subject.model, inputs)
    tiny.assert_close(found, usual, oracle, tiny.real(inputs))
    with reference(subject.model, tiny.whole(subject)):
        found = tiny.logits(subject.model, inputs)
    tiny.assert_close(found, usual, oracle, tiny.real(inputs))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PROMPTS)
def test_any_plan_matches_the_reference(subject: Subject, name: str, seed: int) -> None:
    check_plan(subject, 100 * len(name) + seed, tiny.batch(PROMPTS[name]))


@pytest.mark.parametrize("blocks", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("name", GRIDS)
def test_any_grid_in_blocks_matches_the_reference(
    subject: Subject, name: str, blocks: None
) -> None:
    rows, grids_of = GRIDS[name]
    for seed in range(3):
        check_plan(subject, 100 * len(name) + seed, tiny.batch(rows), grids_of)


def test_shipped_block_sizes_match_the_reference_on_a_larger_image() -> None:
    subject = tiny.make_subject("gqa", side=12)
    inputs = tiny.batch([[1, 5, 6, *[IMAGE] * 144, 7, 8]], side=12)
    for seed in range(4):
        check_plan(subject, seed, inputs)


def test_plans_change_the_logits(subject: Subject) -> None:
    """Otherwise equality with the reference would prove nothing."""
    inputs = tiny.batch(PROMPTS["one image"])
    stock, text = tiny.logits(subject.model, inputs), tiny.real_text(inputs)
    said = [stock]
    for seed in range(6):
        plan = subject.random_plan(seed)
        with pruned(subject.model, plan):
            said.append(tiny.logits(subject.model, inputs))
    for one, other in zip(said, said[1:], strict=False):
        assert (one - other)[text].abs().max() > 0.01 * stock.abs().max()


def test_text_before_the_image_is_untouched(mha: Subject) -> None:
    inputs = tiny.batch(PROMPTS["one image"])
    usual, oracle = tiny.logits(mha.model, inputs), tiny.logits(mha.oracle, inputs)
    plan = mha.random_plan(3)
    with pruned(mha.model, plan):
        found = tiny.logits(mha.model, inputs)
    front = torch.zeros_like(tiny.real(inputs))
    front[:, :3] = True
    tiny.assert_close(found, usual, oracle, front)


@pytest.mark.parametrize("seed", range(3))
def test_right_padding_is_supported(subject: Subject, seed: int) -> None:
    check_plan(subject, seed, tiny.batch(PROMPTS["one and two images"], pad="right"))


@pytest.mark.parametrize("seed", range(3))
def test_an_image_may_be_hidden_by_the_attention_mask(subject: Subject, seed: int) -> None:
    inputs = tiny.batch(PROMPTS["two images apart"])
    inputs["attention_mask"][0, 2:18] = 0
    check_plan(subject, seed, inputs)


@pytest.mark.parametrize("seed", range(3))
def test_embeddings_may_replace_ids(subject: Subject, seed: int) -> None:
    plan = subject.random_plan(seed)
    inputs = tiny.batch(PROMPTS["one and two images"])
    with pruned(subject.model, plan):
        by_ids = tiny.logits(subject.model, inputs)
        embeds = subject.model.get_input_embeddings()(inputs.pop("input_ids"))
        by_embeds = tiny.logits(subject.model, inputs | {"inputs_embeds": embeds})
    assert torch.equal(by_embeds, by_ids)


@pytest.mark.parametrize("seed", range(3))
def test_position_ids_are_used_and_optional(subject: Subject, seed: int) -> None:
    inputs = tiny.batch(PROMPTS["one and two images"])
    counted = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    check_plan(subject, seed, inputs | {"position_ids": counted})
    check_plan(subject, seed, inputs | {"position_ids": counted[:1] + 5})
    plan = subject.random_plan(seed)
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    with pruned(subject.model, plan):
        implied = tiny.logits(subject.model, inputs)
        given = tiny.logits(subject.model, inputs | {"position_ids": places})
    assert torch.equal(given, implied)


def test_no_attention_mask_means_no_padding(subject: Subject) -> None:
    inputs = tiny.batch(PROMPTS["two images apart"])
    plan = subject.random_plan(2)
    with pruned(subject.model, plan):
        with_mask = tiny.logits(subject.model, inputs)
        inputs.pop("attention_mask")
        assert torch.equal(tiny.logits(subject.model, inputs), with_mask)


def test_without_a_cache_the_result_is_the_same(subject: Subject) -> None:
    inputs = tiny.batch(PROMPTS["one and two images"])
    plan = subject.random_plan(2)
    with torch.no_grad(), pruned(subject.model, plan):
        with_cache = subject.model(**inputs, use_cache=True)
        without = subject.model(**inputs, use_cache=False)
        as_tuple = subject.model(**inputs, use_cache=False, return_dict=False)
    assert torch.equal(without.logits, with_cache.logits)
    assert torch.equal(as_tuple[0], with_cache.logits)
    assert with_cache.past_key_values is not None and without.past_key_values is None


def test_logits_to_keep_gives_the_last_positions(mha: Subject) -> None:
    inputs = tiny.batch(PROMPTS["one image"])
    plan = mha.random_plan(2)
    with pruned(mha.model, plan):
        whole = tiny.logits(mha.model, inputs)
        last = tiny.logits(mha.model, inputs | {"logits_to_keep": 1})
    torch.testing.assert_close(last, whole[:, -1:])


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_is_as_accurate_as_the_stock_model(mha: Subject, seed: int) -> None:
    inputs = tiny.batch(PROMPTS["one and two images"])
    plan = mha.random_plan(seed)
    model = tiny.llava("mha").to(torch.bfloat16)
    with reference(mha.oracle, plan):
        oracle = tiny.logits(mha.oracle, inputs)
    with reference(model, plan):
        usual = tiny.logits(model, inputs)
    with pruned(model, plan):
        found = tiny.logits(model, inputs)
    assert found.dtype == torch.bfloat16
    tiny.assert_close(found, usual, oracle, tiny.real_text(inputs))


@pytest.mark.parametrize("seed", range(3))
def test_float64_differs_only_by_rounding(subject: Subject, seed: int) -> None:
    """In the oracle's own precision, only the order of sums differs."""
    inputs = tiny.batch(PROMPTS["one and two images"])
    plan = subject.random_plan(seed)
    with reference(subject.model, plan):
        single = tiny.logits(subject.model, inputs)
    with reference(subject.oracle, plan):
        oracle = tiny.logits(subject.oracle, inputs)
    with pruned(subject.oracle, plan):
        found = tiny.logits(subject.oracle, inputs)
    text = tiny.real_text(inputs)
    rounding = (single.double() - oracle)[text].abs().max()
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    assert (found - oracle)[text].abs().max() <= 100 * rounding * finer


def test_a_prompt_that_ends_in_a_dropped_image_warns(mha: Subject) -> None:
    plan = mha.random_plan(5)
    gone = plan.with_layers((plan.layers[0], *[LayerPlan((), (), None, 0)] * 3))
    with pruned(mha.model, gone), pytest.warns(UserWarning, match="ends in an image"):
        tiny.logits(mha.model, tiny.batch([[1, 5, *PICTURE]]))
