"""Several forwards over one cache (decode steps, further turns, new images) are compared with
one forward of the reference over all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject
from transformers import DynamicCache, LlavaForConditionalGeneration

from yopo.models.family import GridsOf
from yopo.runtime import buffers
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference

Turn = list[list[int]]
"""Token ids per batch row; shorter rows are padded on the left."""


def words(*rows: list[int]) -> list[Turn]:
    """Build decode steps: one token per forward and row."""
    return [[[token] for token in step] for step in zip(*rows, strict=True)]


PROMPT = [[1, 5, 6, *PICTURE, 7, 8]]
TWO_ROWS = [[1, 5, 6, *PICTURE, 7, 8, 9], [1, *PICTURE, 3, *PICTURE, 4]]
CONVERSATIONS: dict[str, list[Turn]] = {
    "decode": [PROMPT, *words([10, 11, 12, 13])],
    "decode after text alone": [[[1, 2, 3]], *words([4, 5])],
    "several tokens at once": [PROMPT, [[10, 11, 12]], *words([13]), [[14, 15]]],
    "a new image": [PROMPT, *words([10, 11]), [[12, *PICTURE, 13, 14]], *words([15, 16])],
    "a new image first": [PROMPT, [[*PICTURE, 13]], *words([15])],
    "two new images": [PROMPT, *words([10]), [[12, *PICTURE, *PICTURE, 13]], *words([15])],
    "the first image in the second turn": [[[1, 2, 3]], [[4, *PICTURE, 5]], *words([6, 7])],
    "three turns": [PROMPT, [[12, *PICTURE, 13]], [[14, 15]], [[16, *PICTURE, 17]], *words([18])],
    "decode, padded": [TWO_ROWS, *words([10, 11, 12], [20, 21, 22])],
    "new images, padded": [TWO_ROWS, [[10, *PICTURE, 11], [2, 12, *PICTURE, 14]], *words([4], [5])],
    "a new image in one row": [TWO_ROWS, [[10, *PICTURE, 11, 12], [13, 14]], *words([4], [5])],
    "one and two new images": [
        TWO_ROWS,
        *words([40], [50]),
        [[10, *PICTURE, *PICTURE, 12], [13, *PICTURE, 14]],
        *words([4], [5]),
    ],
    "first images in other turns": [
        [[1, 2, 3], [1, *PICTURE, 4]],
        [[5, *PICTURE, 6], [7, 8]],
        *words([4, 3], [5, 2]),
    ],
}


@dataclass
class Talk:
    """Inputs of every forward of a conversation, and of one forward over all of it."""

    turns: list[dict[str, Any]]
    together: dict[str, Any]

    @classmethod
    def of(cls, conversation: list[Turn]) -> Talk:
        turns, pixels = [], [[] for _ in conversation[0]]
        for number, rows in enumerate(conversation):
            turn = tiny.batch(rows, seed=number)
            fresh = iter(turn.get("pixel_values", ()))
            for row, tokens in zip(pixels, rows, strict=True):
                row.extend(next(fresh) for _ in range(tokens.count(IMAGE) // len(PICTURE)))
            turns.append(turn)
        together = {
            key: torch.cat([turn[key] for turn in turns], dim=1)
            for key in ("input_ids", "attention_mask")
        }
        every = [picture for row in pixels for picture in row]  # by row, then by turn
        if every:
            together["pixel_values"] = torch.stack(every)
        for number, turn in enumerate(turns):  # a forward's mask covers what is cached, too
            end = sum(each["input_ids"].shape[1] for each in turns[: number + 1])
            turn["attention_mask"] = together["attention_mask"][:, :end]
        return cls(turns, together)


@torch.no_grad()
def say(
    model: LlavaForConditionalGeneration, turns: list[dict[str, Any]], cache: DynamicCache
) -> torch.Tensor:
    """Return (batch, all tokens, vocabulary) logits of consecutive forwards."""
    said = []
    for turn in turns:
        said.append(model(**tiny.as_dtype(turn, model.dtype), past_key_values=cache).logits)
    return torch.cat(said, dim=1)


def check_talk(
    subject: Subject, talk: Talk, seed: int, *, grids: tuple[GridsOf | None, GridsOf | None]
) -> None:
    plan = subject.random_plan(seed)
    by_turn, at_once = grids
    with reference(subject.model, plan, grids_of=at_once):
        usual = tiny.logits(subject.model, talk.together)
    with reference(subject.oracle, plan, grids_of=at_once):
        oracle = tiny.logits(subject.oracle, talk.together)
    cache = DynamicCache()
    with pruned(subject.model, plan, grids_of=by_turn):
        found = say(subject.model, talk.turns, cache)
    tiny.assert_close(found, usual, oracle, tiny.real_text(talk.together))
    assert cache.get_seq_length() == talk.together["input_ids"].shape[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_matches_the_reference_over_all_of_it(
    subject: Subject, name: str, seed: int
) -> None:
    talk = Talk.of(CONVERSATIONS[name])
    check_talk(subject, talk, 100 * len(name) + seed, grids=(None, None))


@pytest.mark.parametrize("name", ["decode", "a new image", "new images, padded"])
def test_under_the_whole_plan_it_is_the_stock_model(subject: Subject, name: str) -> None:
    talk = Talk.of(CONVERSATIONS[name])
    usual = tiny.logits(subject.model, talk.together)
    oracle = tiny.logits(subject.oracle, talk.together)
    with pruned(subject.model, tiny.whole(subject)):
        found = say(subject.model, talk.turns, DynamicCache())
    tiny.assert_close(found, usual, oracle, tiny.real(talk.together))


@pytest.mark.parametrize("seed", range(3))
def test_new_images_may_have_other_grids(subject: Subject, seed: int) -> None:
    """Every turn has the same counts on other grids, so the first turn's must not be reused."""
    talk = Talk.of([PROMPT, [[12, *PICTURE, 13, 14]], *words([15])])
    by_turn = iter([[(2, 8)], [(8, 2)]])
    check_talk(
        subject,
        talk,
        seed,
        grids=(
            lambda config, rows, images: tiny.fixed_grids(next(by_turn))(config, rows, images),
            tiny.fixed_grids([(2, 8), (8, 2)]),
        ),
    )


def test_decoding_outgrows_its_buffers(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "HEADROOM", 2)
    talk = Talk.of([TWO_ROWS, *words(list(range(10, 30)), list(range(40, 60)))])
    check_talk(subject, talk, 1, grids=(None, None))


@pytest.mark.parametrize("seed", range(3))
def test_given_positions_continue_where_they_ended(subject: Subject, seed: int) -> None:
    """They are counted over real tokens, not over padding, as generate passes them."""
    talk = Talk.of(CONVERSATIONS["new images, padded"])
    counted = (talk.together["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    talk.together["position_ids"] = counted
    start = 0
    for turn in talk.turns:
        stop = start + turn["input_ids"].shape[1]
        turn["position_ids"] = counted[:, start:stop]
        start = stop
    check_talk(subject, talk, seed, grids=(None, None))


def test_image_tokens_without_an_image_are_text(subject: Subject) -> None:
    """Prompt lookup proposes them; the stock model treats them as text too."""
    prompt = tiny.batch(PROMPT)
    proposed = {"input_ids": torch.tensor([[9, IMAGE, IMAGE, IMAGE]])}
    usual = say(subject.model, [prompt, proposed], DynamicCache())
    oracle = say(subject.oracle, [prompt, proposed], DynamicCache())
    with pruned(subject.model, tiny.whole(subject)):
        found = say(subject.model, [prompt, proposed], DynamicCache())
    tiny.assert_close(found, usual, oracle, torch.ones(found.shape[:2], dtype=torch.bool))
