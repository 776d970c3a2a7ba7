"""``generate`` on a pruned model gives the tokens of the cache-free reference, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.generation import BaseStreamer

from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference
from yopo.support.errors import ModelError

ONE = [[1, 5, 6, *PICTURE, 7, 8, 9, 10]]
TWO_ROWS = [[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, *PICTURE, 9]]
ONE_WITHOUT = [[1, 5, 6, *PICTURE, 7, 8], [1, 2, 3]]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
}


def generate(
    model: LlavaForConditionalGeneration, inputs: dict[str, Any], **options: Any
) -> torch.Tensor:
    """Return token ids, prompt included; the random model must not generate ``<image>``."""
    options = {"max_new_tokens": 8, "suppress_tokens": [IMAGE], "do_sample": False} | options
    torch.manual_seed(0)
    return model.generate(**tiny.as_dtype(inputs, model.dtype), **options)


def specified(
    subject: Subject, plan: PruningPlan, inputs: dict[str, Any], **options: Any
) -> torch.Tensor:
    with reference(subject.oracle, plan):
        return generate(subject.oracle, inputs, use_cache=False, **options)


@pytest.fixture(params=range(2))
def plan(request: pytest.FixtureRequest, subject: Subject) -> PruningPlan:
    return subject.random_plan(40 + request.param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [ONE, TWO_ROWS, ONE_WITHOUT], ids=["one", "two", "one without"])
def test_generate_gives_the_same_tokens(
    subject: Subject, plan: PruningPlan, rows: list, mode: str
) -> None:
    inputs, options = tiny.batch(rows), MODES[mode]
    if mode == "beams":
        tiny.skip_unless_beams_get_their_images(subject.oracle, inputs)
    expected = specified(subject, plan, inputs, **options)
    with pruned(subject.oracle, plan):
        found = generate(subject.oracle, inputs, **options)
    assert torch.equal(found, expected)
    new = expected[:, inputs["input_ids"].shape[1] :]
    assert len(new.unique()) > 2  # a model that repeats itself would hide mistakes


def test_generate_works_without_a_cache(subject: Subject, plan: PruningPlan) -> None:
    inputs = tiny.batch(TWO_ROWS)
    with pruned(subject.oracle, plan):
        with_cache = generate(subject.oracle, inputs)
        assert torch.equal(generate(subject.oracle, inputs, use_cache=False), with_cache)


def test_generate_works_from_embeddings(subject: Subject, plan: PruningPlan) -> None:
    inputs = tiny.batch(ONE)
    with pruned(subject.oracle, plan):
        by_ids = generate(subject.oracle, inputs)
        ids = inputs.pop("input_ids")
        embeds = subject.oracle.get_input_embeddings()(ids).detach()
        by_embeds = generate(subject.oracle, inputs | {"inputs_embeds": embeds})
    assert torch.equal(by_embeds, by_ids[:, ids.shape[1] :])


class Collector(BaseStreamer):
    """A streamer that keeps what it receives."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.sent += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_generate_streams_tokens(subject: Subject, plan: PruningPlan) -> None:
    inputs, streamer = tiny.batch(ONE), Collector()
    with pruned(subject.oracle, plan):
        tokens = generate(subject.oracle, inputs, streamer=streamer)
    assert streamer.ended and streamer.sent == tokens[0].tolist()
    assert torch.equal(tokens, specified(subject, plan, inputs))


def test_generate_works_with_prompt_lookup(subject: Subject, plan: PruningPlan) -> None:
    inputs = tiny.batch([[1, 5, 6, *PICTURE, 7, 8, 9, 7, 8, 9, 7, 8]])
    with pruned(subject.oracle, plan):
        found = generate(subject.oracle, inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(found, specified(subject, plan, inputs))


def test_a_second_turn_with_a_new_image_continues_the_cache(
    subject: Subject, plan: PruningPlan
) -> None:
    first, cache = tiny.batch(ONE), DynamicCache()
    new = tiny.pictures(1, seed=7)
    with pruned(subject.oracle, plan):
        said = generate(subject.oracle, first, past_key_values=cache)
        ids = torch.cat([said, torch.tensor([[11, *PICTURE, 12, 13]])], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": new}
        found = generate(subject.oracle, turn, past_key_values=cache)
    together = turn | {"pixel_values": torch.cat([first["pixel_values"], new])}
    assert torch.equal(found, specified(subject, plan, together))


def test_a_second_turn_may_use_beams(subject: Subject, plan: PruningPlan) -> None:
    """With text only, because transformers cannot expand a new image next to a cached one."""
    first, cache = tiny.batch(ONE), DynamicCache()
    with pruned(subject.oracle, plan):
        said = generate(subject.oracle, first, past_key_values=cache)
        ids = torch.cat([said, torch.tensor([[11, 12, 13]])], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache.batch_repeat_interleave(3)
        found = generate(subject.oracle, turn, past_key_values=cache, num_beams=3)
    together = turn | {"pixel_values": first["pixel_values"]}
    assert torch.equal(found, specified(subject, plan, together, num_beams=3))


def test_prefill_in_chunks_that_split_an_image_is_refused(
    subject: Subject, plan: PruningPlan
) -> None:
    tiny.skip_unless_takes_encoded(subject.oracle)
    inputs = tiny.batch(ONE)
    with pruned(subject.oracle, plan), pytest.raises(ModelError, match="whole number of images"):
        generate(subject.oracle, inputs, prefill_chunk_size=10)


def test_a_static_cache_is_refused(subject: Subject, plan: PruningPlan) -> None:
    inputs = tiny.batch(ONE)
    with pruned(subject.oracle, plan), pytest.raises(ModelError, match="StaticLayer"):
        generate(subject.oracle, inputs, cache_implementation="static")
