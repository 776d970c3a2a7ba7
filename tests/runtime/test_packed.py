"""In rows that hold several samples in sequence, none attends to another's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import PICTURE, Subject

from yopo.plans import grid
from yopo.runtime.install import pruned
from yopo.support.errors import ModelError

SAMPLES = {
    "images": [[1, 5, *PICTURE, 7, 8], [1, 6, *PICTURE, 9], [1, *PICTURE, *PICTURE, 3, 4]],
    "text between": [[1, 5, *PICTURE, 7, 8], [1, 2, 3], [1, *PICTURE, 9]],
    "image to image": [[1, 5, *PICTURE], [*PICTURE, 4, 3]],
    "text": [[1, 2, 3], [1, 4], [1, 5, 6, 7]],
}


def packed(samples: list[list[int]], **more: Any) -> tuple[dict, list[dict]]:
    """Samples in one row, and each by itself, with the same images."""
    alone = [tiny.batch([sample], seed=seed) for seed, sample in enumerate(samples)]
    together = {
        "input_ids": torch.cat([each["input_ids"] for each in alone], dim=1),
        "position_ids": torch.cat([torch.arange(len(each)) for each in samples])[None],
        "use_cache": False,
    }
    pixels = [each["pixel_values"] for each in alone if "pixel_values" in each]
    if pixels:
        together["pixel_values"] = torch.cat(pixels)
    return together | more, alone


def starts(samples: list[list[int]]) -> torch.Tensor:
    lengths = torch.tensor([0, *map(len, samples)])
    return lengths.cumsum(0).to(torch.int32)


@pytest.fixture(params=[None, 1], ids=["whole images", "rows of images"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(grid, "ROWS_PER_BLOCK", request.param)
        monkeypatch.setattr(grid, "TOKENS_PER_BLOCK", 1)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SAMPLES)
def test_packed_samples_match_separate_ones(subject: Subject, name: str, seed: int) -> None:
    plan = subject.random_plan(60 + seed)
    together, alone = packed(SAMPLES[name])
    with pruned(subject.model, plan):
        found = tiny.logits(subject.model, together)
        usual = torch.cat([tiny.logits(subject.model, each) for each in alone], dim=1)
    with pruned(subject.oracle, plan):
        oracle = torch.cat([tiny.logits(subject.oracle, each) for each in alone], dim=1)
    where = together["input_ids"] != tiny.IMAGE
    tiny.assert_close(found, usual, oracle, where)


@pytest.mark.parametrize("has_cache", [False, True])
def test_under_the_whole_plan_it_is_the_stock_model(subject: Subject, has_cache: bool) -> None:
    """The stock model separates samples by positions only if nothing is cached."""
    together, _ = packed(SAMPLES["images"], use_cache=has_cache)
    usual, oracle = (tiny.logits(each, together) for each in (subject.model, subject.oracle))
    with pruned(subject.model, tiny.whole(subject)):
        found = tiny.logits(subject.model, together)
    tiny.assert_close(found, usual, oracle, torch.ones_like(together["input_ids"]).bool())


@pytest.mark.parametrize("has_positions", [False, True])
def test_lengths_from_a_padding_free_collator_are_equivalent(
    mha: Subject, has_positions: bool
) -> None:
    plan = mha.random_plan(3)
    together, _ = packed(SAMPLES["images"])
    ends = starts(SAMPLES["images"])
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 20, "max_length_k": 20}
    with pruned(mha.model, plan):
        expected = tiny.logits(mha.model, together)
        if has_positions:
            found = tiny.logits(mha.model, together | lengths | {"use_cache": True})
            assert torch.equal(found, expected)
        else:  # other positions, so another answer; but one sample's is its own
            del together["position_ids"]
            first = len(SAMPLES["images"][0])
            found = tiny.logits(mha.model, together | lengths)
            assert torch.allclose(found[:, :first], expected[:, :first], atol=1e-5)
            plain = tiny.logits(mha.model, together)
            assert not torch.allclose(found[:, first:], plain[:, first:], atol=1e-2)
            one = together | {"cu_seq_lens_q": ends[[0, -1]]}
            assert torch.equal(tiny.logits(mha.model, one), plain)


@torch.no_grad()
def test_packed_rows_do_not_continue_a_cache(mha: Subject) -> None:
    plan = mha.random_plan(3)
    with pruned(mha.model, plan):
        cache = mha.model(**tiny.batch([SAMPLES["images"][0]])).past_key_values
        step = {"input_ids": torch.tensor([[9, 10]]), "cu_seq_lens_q": torch.tensor([0, 1, 2])}
        with pytest.raises(ModelError, match="packed"):
            mha.model(**step, past_key_values=cache)


def test_lengths_that_do_not_fit_are_refused(mha: Subject) -> None:
    plan = mha.random_plan(3)
    together, _ = packed(SAMPLES["images"])
    together["cu_seq_lens_q"] = starts(SAMPLES["images"])[:-1]
    with pruned(mha.model, plan), pytest.raises(ModelError, match="that end at its"):
        tiny.logits(mha.model, together)


def test_several_packed_rows_match_separate_samples(mha: Subject) -> None:
    """The rows have one length, with samples that begin at different places."""
    plan = mha.random_plan(3)
    rows = [[[1, 5, *PICTURE, 7], [1, 2, *PICTURE, 8, 9]], [[1, 2, 3, *PICTURE], [*PICTURE, 4, 5]]]
    rows[1][1] += [6, 7]
    singles = [packed(row)[0] for row in rows]
    singles[1]["pixel_values"] = tiny.pictures(2, seed=9)
    together = {
        name: torch.cat([each[name] for each in singles])
        for name in ("input_ids", "position_ids", "pixel_values")
    } | {"use_cache": False}
    with pruned(mha.model, plan):
        found = tiny.logits(mha.model, together)
        expected = torch.cat([tiny.logits(mha.model, each) for each in singles])
    where = together["input_ids"] != tiny.IMAGE
    assert torch.allclose(found[where], expected[where], atol=1e-4)


def test_unsupported_masks_are_named_in_the_error(mha: Subject) -> None:
    plan = mha.random_plan(3)
    inputs = tiny.batch([SAMPLES["images"][0]])
    length = inputs["input_ids"].shape[1]
    masks = {
        "found 4-D": torch.ones(1, 1, length, length),
        "found a dict": {"full_attention": inputs["attention_mask"]},
    }
    for message, mask in masks.items():
        with pruned(mha.model, plan), pytest.raises(ModelError, match=message):
            tiny.logits(mha.model, inputs | {"attention_mask": mask})
