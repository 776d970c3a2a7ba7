"""Calls that take turns: one runs at a time, in order, and all have ended when one fails."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import pytest
import tiny
import torch
import zoo
from greenlet import greenlet
from tiny import PICTURE, Subject
from torch import nn, overrides
from torch.overrides import TorchFunctionMode

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
    """Neither calls that wait nor modes nor hooks."""
    yield
    assert not [each for each in gc.get_objects() if type(each) is greenlet and each.gr_frame]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert overrides._len_torch_function_stack() == 0
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


def test_ctrl_c_ends_all(mha: Subject, trace: list[Any]) -> None:
    """Calls that wait leave what they are in, in order."""

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)

    def call(number: int, inputs: dict[str, Any]) -> None:
        try:
            mha.model(**inputs)
        finally:
            trace.append(f"{number} left")

    layer = mha.model.get_decoder().layers[1]
    handle = layer.mlp.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(mha, call)
    finally:
        handle.remove()
    assert trace[-5:] == [("in", 1), *(f"{number} left" for number in range(4))]


def test_a_call_that_does_not_want_to_end_is_ended_at_every_layer(mha: Subject) -> None:
    tried: list[int] = []

    def call(number: int, inputs: dict[str, Any]) -> None:
        if number == 3:
            raise ModelError("no more")
        for _ in range(3):
            try:
                mha.model(**inputs)
            except BaseException:
                tried.append(number)

    with pytest.raises(ModelError, match="no more"):
        run(mha, call)
    assert tried == [0, 0, 0, 1, 1, 1, 2, 2, 2]


class Counting(TorchFunctionMode):
    """Counts the functions that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_modes_are_those_of_the_call_that_runs(mha: Subject) -> None:
    """What one call sets around its forward does not reach the others, which set something else."""
    settings = [torch.no_grad, torch.enable_grad, torch.inference_mode, nullcontext]
    seen: list[tuple[bool, bool, int]] = []

    def call(number: int, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
        with Counting() as outer, Counting() if number == 1 else nullcontext(), settings[number]():
            return mha.model(**inputs).logits, outer.count

    def see(*_: object) -> None:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        seen.append((*modes, overrides._len_torch_function_stack()))

    usual = [call(number, inputs) for number, inputs in enumerate(PROMPTS)]
    handle = mha.model.get_decoder().layers[1].mlp.register_forward_pre_hook(see)
    try:
        with torch.no_grad():
            found = run(mha, call)
    finally:
        handle.remove()
    assert seen == [(False, False, 1), (True, False, 2), (False, True, 1), (False, False, 1)]
    for (one, count), (other, expected) in zip(found, usual, strict=True):
        assert torch.equal(one, other)
        assert count == expected


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
