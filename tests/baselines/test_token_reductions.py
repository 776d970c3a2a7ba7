"""Reductions of tokens as baselines: what they keep, where, and at which cost."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject

from yopo.baselines.baseline import Baseline
from yopo.baselines.install import baseline
from yopo.baselines.registry import baseline_class
from yopo.models.answer_tokens import teacher_forced
from yopo.models.family import shape_of
from yopo.models.reduced import choose
from yopo.models.streams import build_layout
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, Workload
from yopo.reduction.registry import make_method

NAMES = ("par", "divprune", "cdpruner", "folder", "grid")
PROMPTS = [[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, 9, 11, 12]]


def _made(name: str, share: float) -> Baseline:
    return baseline_class(name)(share)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_tokens_is_the_dense_model(subject: Subject, name: str) -> None:
    model, inputs = subject.model, tiny.batch(PROMPTS)
    with torch.no_grad():
        with baseline(model, baseline_class("vtw")(99)):  # drops nothing
            expected = model(**inputs).logits
        with baseline(model, _made(name, 1.0)):
            found = model(**inputs).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_holds_the_kept_tokens_only(subject: Subject, name: str) -> None:
    model, inputs = subject.model, tiny.batch(PROMPTS)
    method = _made(name, 0.5)
    with torch.no_grad(), baseline(model, method):
        cache = model(**inputs, use_cache=True).past_key_values
    grid = Grid(*_grid(subject))
    expected = method.tokens(tiny_shape(subject), (grid,))[0]
    dropped = grid.tokens - expected
    assert dropped > 0
    assert {each.keys.shape[2] for each in cache.layers} == {inputs["input_ids"].shape[1] - dropped}
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_steps_continue_the_prefill_and_answers_change_nothing(subject: Subject, name: str) -> None:
    """A forced answer gives what generation step by step gives: it is no part of the prompt."""
    model, inputs = subject.model, tiny.batch(PROMPTS[:1])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), baseline(model, _made(name, 0.5)):
        whole = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
        answered = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        if "mm_token_type_ids" in inputs:
            kinds = torch.zeros_like(whole)
            kinds[:, :length] = inputs["mm_token_type_ids"]
            answered["mm_token_type_ids"] = kinds
        mask = torch.zeros_like(whole, dtype=torch.bool)
        mask[:, length:] = True
        with teacher_forced(mask):
            logits = model(**answered).logits
    logits[..., IMAGE] = float("-inf")
    assert torch.equal(logits[:, length - 1 : -1].argmax(dim=-1), whole[:, length:])


def tiny_shape(subject: Subject) -> ModelShape:
    return shape_of(subject.model.config)


def _grid(subject: Subject) -> tuple[int, int]:
    side = int(len(PICTURE) ** 0.5)
    return side, len(PICTURE) // side


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_is_met_from_below(subject: Subject, name: str) -> None:
    shape, workload = tiny_shape(subject), Workload((Grid(8, 8),), 20, 4)
    method = baseline_class(name).solve(shape, workload, 0.3)
    assert 0.2 < method.reached(shape, workload) <= 0.3
    assert method.prefill_flops(shape, workload) > method.visual_flops(shape, workload)


GRIDS = [(Grid(2, 3), Grid(3, 3)), (Grid(3, 3),)]


@pytest.mark.parametrize("name", [*NAMES, "random"])
def test_rows_may_hold_different_images(name: str) -> None:
    """Every image gets what it would get alone, whatever its row and the padding hold."""
    torch.manual_seed(0)
    method, embeds = make_method(name, 0.4), torch.randn(2, 24, 8)
    is_visual = torch.zeros(2, 24, dtype=torch.bool)
    is_visual[0, 2:8] = is_visual[0, 10:19] = True
    is_visual[1, 4:13] = True
    ends = torch.tensor([21, 15])
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, :2] = False
    found = choose(method, build_layout(is_visual, GRIDS), embeds, ends, real)
    assert found is not None and [len(row) for row in found] == [2, 1]
    assert [each.start for each in found[0]] == [0, 6]
    alone = choose(method, build_layout(is_visual[1:], GRIDS[1:]), embeds[1:], ends[1:], real[1:])
    assert alone is not None
    assert torch.equal(alone[0][0].kept, found[1][0].kept)
    changed = embeds.clone()
    changed[1, :2] = changed[1, 16:] = 5.0  # padding, and an answer
    again = choose(method, build_layout(is_visual, GRIDS), changed, ends, real)
    assert again is not None and torch.equal(again[1][0].kept, found[1][0].kept)


def test_the_question_is_the_text_after_the_last_image() -> None:
    torch.manual_seed(0)
    method, embeds = make_method("cdpruner", 0.2), torch.randn(1, 24, 8)
    is_visual = torch.zeros(1, 24, dtype=torch.bool)
    is_visual[0, 4:20] = True
    layout, ends = build_layout(is_visual, [(Grid(4, 4),)]), torch.tensor([22])

    def kept(changed: slice) -> torch.Tensor:
        other = embeds.clone()
        other[:, changed] = torch.randn(8)
        found = choose(method, layout, other, ends, None)
        assert found is not None
        return found[0][0].kept

    own = choose(method, layout, embeds, ends, None)
    assert own is not None
    assert all(torch.equal(own[0][0].kept, kept(part)) for part in (slice(0, 4), slice(23, 24)))
    assert any(not torch.equal(own[0][0].kept, kept(slice(20, 23))) for _ in range(5))


def test_nothing_dropped_is_nothing_chosen() -> None:
    layout = build_layout(torch.ones(1, 1, dtype=torch.bool), [(Grid(1, 1),)])
    assert (
        choose(make_method("par", 0.1), layout, torch.ones(1, 1, 4), torch.tensor([0]), None)
        is None
    )
