"""In several threads, every call on one model gives what it would give by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject
from transformers import DynamicCache

from yopo.runtime.install import install, pruned, uninstall
from yopo.support.context import PerContext
from yopo.support.errors import ModelError

PROMPTS = [
    tiny.batch([[1, 5, 6, *PICTURE, 7, 8]], seed=1),
    tiny.batch([[*PICTURE, 9, *PICTURE, 4]], seed=2),
    tiny.batch([[1, 2, 3, 4]]),
    tiny.batch([[1, 5, *PICTURE, 7], [1, 2, 3]], seed=3),
]
PATIENCE = 60.0
"""Seconds until threads that wait for one another count as stuck."""


def say(subject: Subject, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return subject.model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE]
    )


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Return the results of calls, each in its own thread."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.fixture
def meeting(mha: Subject) -> Any:
    """Make two forwards begin before either reaches the decoder, so that they surely overlap."""
    barrier = threading.Barrier(2, timeout=PATIENCE)

    def meet(*_: object) -> None:
        barrier.wait()

    handle = mha.model.get_decoder().register_forward_pre_hook(meet)
    yield handle
    handle.remove()


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 3)])
def test_overlapping_forwards_do_not_see_one_anothers_images(
    mha: Subject, meeting: Any, pair: tuple[int, int]
) -> None:
    plan = mha.random_plan(3)
    prompts = [PROMPTS[number] for number in pair]
    with pruned(mha.model, plan):
        found = at_once([lambda each=each: tiny.logits(mha.model, each) for each in prompts])
        meeting.remove()
        expected = [tiny.logits(mha.model, each) for each in prompts]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_many_threads_may_run_forward_and_generate(mha: Subject) -> None:
    plan = mha.random_plan(3)
    with pruned(mha.model, plan):
        logits = [tiny.logits(mha.model, each) for each in PROMPTS]
        tokens = [say(mha, each) for each in PROMPTS]

        def work(shift: int) -> int:
            wrong = 0
            for turn in range(10):
                number = (turn + shift) % len(PROMPTS)
                wrong += not torch.equal(tiny.logits(mha.model, PROMPTS[number]), logits[number])
                if turn % 2:
                    wrong += not torch.equal(say(mha, PROMPTS[number]), tokens[number])
            return wrong

        assert at_once([lambda shift=shift: work(shift) for shift in range(4)]) == [0] * 4


def test_a_thread_started_inside_a_block_is_pruned(mha: Subject) -> None:
    """A streamer's thread is one."""
    plan = mha.random_plan(3)
    with pruned(mha.model, plan):
        expected = tiny.logits(mha.model, PROMPTS[0])
        assert torch.equal(at_once([lambda: tiny.logits(mha.model, PROMPTS[0])])[0], expected)
    assert not torch.equal(tiny.logits(mha.model, PROMPTS[0]), expected)


@pytest.mark.parametrize("where", ["base_model", "decoder", "layer"])
@pytest.mark.parametrize("begins", ["dense", "pruned"])
def test_a_forward_under_way_at_the_edge_of_a_block_is_consistent(
    mha: Subject, where: str, begins: str
) -> None:
    plan = mha.random_plan(3)
    decoder = mha.model.get_decoder()
    module = {"base_model": mha.model.model, "decoder": decoder, "layer": decoder.layers[1].mlp}
    dense = tiny.logits(mha.model, PROMPTS[0])
    with pruned(mha.model, plan):
        sparse = tiny.logits(mha.model, PROMPTS[0])
    under_way, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        under_way.set()
        assert go_on.wait(PATIENCE)

    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        if begins == "pruned":
            install(mha.model, plan)
        handle = module[where].register_forward_pre_hook(wait)
        stack.callback(handle.remove)
        future = pool.submit(tiny.logits, mha.model, PROMPTS[0])
        assert under_way.wait(PATIENCE)
        if begins == "pruned":
            uninstall(mha.model)
        else:
            install(mha.model, plan)
            stack.callback(uninstall, mha.model)
        go_on.set()
        found = future.result()
    assert torch.equal(found, sparse) or torch.allclose(found, dense, atol=1e-4)
    assert torch.equal(tiny.logits(mha.model, PROMPTS[0]), dense)


@torch.no_grad()
def test_a_conversation_across_the_edge_of_a_block_is_refused(mha: Subject) -> None:
    plan = mha.random_plan(3)
    cache, step = DynamicCache(), {"input_ids": torch.tensor([[9]])}
    entered, prefilled, left = (threading.Event() for _ in range(3))

    def talk() -> None:
        assert entered.wait(PATIENCE)
        mha.model(**PROMPTS[0], past_key_values=cache)
        prefilled.set()
        assert left.wait(PATIENCE)
        mha.model(**step, past_key_values=cache)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(torch.no_grad()(talk))
        with pruned(mha.model, plan):
            entered.set()
            assert prefilled.wait(PATIENCE)
        left.set()
        with pytest.raises(ModelError, match="cannot serve the dense one"):
            future.result()


def test_a_context_value_is_neither_shared_nor_kept_alive() -> None:
    class Owner:
        pass

    values: PerContext[Owner, str] = PerContext("test")
    one, other = Owner(), Owner()
    values.set(one, "here")
    assert (values.get(one), values.get(other)) == ("here", None)
    assert at_once([lambda: values.get(one)]) == [None]
    values.set(one, None)
    assert values.get(one) is None
    values.set(other, "there")
    del other
    assert not values._values.get()
