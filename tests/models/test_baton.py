"""Calls that take turns: one runs at a time, in order, and no thread outlives them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
import tiny
import torch
import zoo
from tiny import PICTURE, Subject
from torch import nn

from yopo.models import turns
from yopo.models.layout import LayoutProbe
from yopo.models.turns import in_turns
from yopo.models.window import Holding, window_of
from yopo.support.errors import ModelError

PLENTY = 1 << 30
PROMPTS = [
    tiny.batch([[1, 5, 6, *PICTURE, 7, 8]], seed=1),
    tiny.batch([[*PICTURE, 9, *PICTURE, 4]], seed=2),
    tiny.batch([[1, 2, 3, 4]]),
    tiny.batch([[1, 5, *PICTURE, 7], [1, 2, 3]], seed=3),
]


@pytest.fixture(autouse=True)
def nothing_is_left(mha: Subject) -> Iterator[None]:
    """Neither threads nor hooks."""
    yield
    assert not [each for each in threading.enumerate() if each.name == "yopo-turn"]
    for layer in mha.model.get_decoder().layers:
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks


@pytest.fixture
def trace(mha: Subject, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens: ``("in", layer)``, ``("out", layer)``, and what calls add."""
    layers, found = list(mha.model.get_decoder().layers), []

    @contextmanager
    def at_hand(layer: nn.Module) -> Iterator[None]:
        found.append(("in", layers.index(layer)))
        yield
        found.append(("out", layers.index(layer)))

    monkeypatch.setattr(turns, "at_hand", at_hand)
    return found


def run(subject: Subject, call: Callable[[int, Any], Any], memory: int = PLENTY) -> list[Any]:
    with window_of(memory):
        finished = list(in_turns(subject.model, call, PROMPTS))
    return [each for some in finished for each in some.results]


def test_layers_come_to_hand_once_and_calls_pass_in_order(mha: Subject, trace: list[Any]) -> None:
    numbers = ContextVar("numbers", default=-1)
    layers = list(mha.model.get_decoder().layers)

    def note(module: nn.Module, *_: object) -> None:
        trace.append((numbers.get(), layers.index(module)))

    def call(number: int, inputs: dict[str, Any]) -> torch.Tensor:
        assert numbers.get() == -1
        numbers.set(number)
        found = mha.model(**inputs).logits
        trace.append((number, "tail"))
        return found

    usual = [mha.model(**inputs).logits for inputs in PROMPTS]
    handles = [layer.self_attn.register_forward_pre_hook(note) for layer in ()]
    for layer in layers:
        handles.append(layer.input_layernorm.register_forward_pre_hook(_of(layer, note)))
    try:
        with torch.no_grad():
            found = run(mha, call)
    finally:
        for handle in handles:
            handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(found, usual, strict=True))
    assert not any(each.requires_grad for each in found)
    everyone = range(len(PROMPTS))
    expected: list[Any] = []
    for layer in range(len(layers)):
        expected += [("in", layer), *((number, layer) for number in everyone), ("out", layer)]
    expected += [(number, "tail") for number in everyone]
    assert trace == expected


def _of(layer: nn.Module, call: Callable[[nn.Module], None]) -> Callable[..., None]:
    return lambda *_: call(layer)


def test_a_window_holds_what_memory_does(mha: Subject, trace: list[Any]) -> None:
    """Never more, except for one call that is larger; all of one size here."""
    shape, same = mha.shape, [PROMPTS[0]] * 7
    rows, length = PROMPTS[0]["input_ids"].shape
    states = torch.zeros(rows, length, shape.hidden)
    each = Holding(shape, None).of(states)
    assert Holding(shape, 9).of(states) > each > states.nbytes
    sizes = {0: 1, each: 1, 3 * each - 1: 2, 3 * each: 3, 100 * each: 7}
    for memory, most in sizes.items():
        trace.clear()
        with window_of(memory), torch.no_grad():
            call = lambda _, inputs: mha.model(**inputs).logits  # noqa: E731
            finished = list(in_turns(mha.model, call, same))
        sizes_found = [len(some.results) for some in finished]
        assert sizes_found == [min(most, 7 - i) for i in range(0, 7, most)]
        assert trace.count(("in", 0)) == len(finished) == -(-7 // most)


def test_calls_may_run_the_model_differently_often(mha: Subject, trace: list[Any]) -> None:
    def call(number: int, inputs: dict[str, Any]) -> int:
        for _ in range(number):
            mha.model(**inputs)
        return number

    assert run(mha, call) == list(range(len(PROMPTS)))
    assert trace.count(("in", 0)) == len(PROMPTS) - 1


def test_what_a_call_raises_ends_all(mha: Subject, trace: list[Any]) -> None:
    """At once: the calls after it do not go on."""

    def call(number: int, inputs: dict[str, Any]) -> None:
        mha.model(**inputs)
        trace.append(number)
        if number == 1:
            raise ModelError("found one, expected two")

    with pytest.raises(ModelError, match="found one, expected two"):
        run(mha, call)
    assert [each for each in trace if isinstance(each, int)] == [0, 1]


def test_what_fetching_raises_ends_all(mha: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def at_hand(layer: nn.Module) -> Iterator[None]:
        raise OSError("the disk is gone")
        yield

    monkeypatch.setattr(turns, "at_hand", at_hand)
    with pytest.raises(OSError, match="the disk is gone"):
        run(mha, lambda _, inputs: mha.model(**inputs))


def test_ctrl_c_ends_all_at_the_next_layer(mha: Subject, trace: list[Any]) -> None:
    """A signal goes to the main thread, which waits; the weights stay until the call has left."""

    def interrupt(*_: object) -> None:
        if not trace.count("interrupted"):
            trace.append("interrupted")
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.2)  # the main thread notices while this one computes
            trace.append("left")

    layer = mha.model.get_decoder().layers[1]
    handle = layer.mlp.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(mha, lambda _, inputs: mha.model(**inputs))
    finally:
        handle.remove()
    assert trace[-3:] == [("in", 1), "interrupted", "left"]


def test_probes_of_abandoned_calls_do_not_matter(mha: Subject) -> None:
    """A forward that ended in the middle leaves nothing to the next one."""
    probe = LayoutProbe(mha.model.base_model, lambda *_: [])
    probe.remove()
    with pytest.raises(ZeroDivisionError):
        run(mha, lambda number, inputs: (mha.model(**inputs), 1 // (1 - number)))
    usual = tiny.logits(mha.model, PROMPTS[0])
    assert torch.equal(run(mha, lambda _, inputs: mha.model(**inputs).logits)[0], usual)


def test_what_a_forward_leaves_on_the_model_is_its_own(specimen: zoo.Specimen) -> None:
    """Qwen-VL's models remember where the positions of the text after an image go on."""
    model = specimen.model
    rows = [zoo.PROMPTS["one image"], zoo.PROMPTS["two images"], zoo.PROMPTS["one image"]]
    batches = [specimen.inputs(some, seed) for seed, some in enumerate(rows)]

    def call(_: int, inputs: dict[str, Any]) -> torch.Tensor:
        cache = model(**inputs, use_cache=True).past_key_values
        return model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits

    with torch.no_grad():
        usual = [call(0, inputs) for inputs in batches]
        before = dict(vars(model.base_model))
        with window_of(PLENTY):
            (finished,) = in_turns(model, call, batches)
    assert all(torch.equal(a, b) for a, b in zip(finished.results, usual, strict=True))
    assert {name: vars(model.base_model)[name] for name in before} == before
