"""Forwards of one decoder that pass its layers together, so that each layer is fetched once.

Where layers stay on disk, every forward reads all of them. So the loops over batches and layers are
swapped: the forwards of a window wait at each layer until all are there, the layer is brought to
hand once, each runs through it in turn, and it goes away. They are the ordinary forwards, each on a
stack of its own, which keeps its place while the others run. One runs at a time, in the order of
the items: at every layer, whatever is computed and added up is what a plain loop computes, bit for
bit. ``generate`` goes in lockstep, so that one pass over the layers is a step of all unfinished
answers. So do the layers of a vision tower, if they are on disk.

A stock decoder is stopped by hooks on its layers; a decoder with a loop of its own iterates over
``each_layer``. Where layers are resident the loop is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from yopo.models.baton import Waiting, stopping
from yopo.models.family import shape_of
from yopo.models.offloaded import at_hand, is_offloaded, offloaded_towers
from yopo.models.window import Holding, Load, forced_memory
from yopo.support.memory import give_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_CALLS = 256
"""Most calls of a window, each of which has a stack."""


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """Items that are done with.

    Attributes:
        results: One per item, in order.
        size: The number of units in them: pairs, if items are sized, else items.
    """

    results: Sequence[Result]
    size: int

    def __len__(self) -> int:
        return self.size


def in_turns(
    model: PreTrainedModel,
    call: Callable[[int, Item], Result],
    items: Iterable[Item],
    *,
    new_tokens: int | None = None,
) -> Iterator[Finished[Result]]:
    """Call a function that runs a model on each item, several at a time if its layers are on disk.

    Args:
        model: Dense or pruned.
        call: Given an item's number and the item; runs forwards of the model, or none.
        items: In order.
        new_tokens: The most tokens that a call generates; None: it keeps no keys and values.

    Yields:
        What is finished together: items one by one, or windows of them. No call is in progress
        meanwhile.

    Raises:
        BaseException: What a call raised, or what interrupted this thread. All calls in progress
            are ended before.
    """
    decoder, memory = model.get_decoder(), forced_memory()
    if getattr(decoder, "runs_alone", False) or (memory is None and not is_offloaded(decoder)):
        for number, item in enumerate(items):
            yield Finished((call(number, item),), _size(item))
        return
    load = Load(Holding(shape_of(model.config), new_tokens), memory)
    rest = enumerate(items)
    while True:
        window: _Window[Result] = _Window(model, load)
        size = 0
        with window:
            while not window.is_full() and (found := next(rest, None)) is not None:
                window.admit(partial(call, *found))
                size += _size(found[1])
            window.pass_layers()
        if not window.calls:
            return
        yield Finished([each.result for each in window.calls], size)


class _Window(Generic[Result]):
    """Calls whose forwards pass the layers together, inside a ``with`` block.

    Args:
        model: The model that they run.
        load: Counts what they hold, and knows what fits.
    """

    def __init__(self, model: PreTrainedModel, load: Load):
        self.calls: list[Waiting[Result]] = []
        self._model, self._load = model, load
        decoder = model.get_decoder()
        self._decoder, self._tower = list(decoder.layers), offloaded_towers(model)
        self._layers = [*self._decoder, None, *self._tower]
        self._ahead: list[Waiting[Result]] = []

    def __enter__(self) -> _Window[Result]:
        self._load.start()
        self._hooks = stopping(self._decoder, self._tower)
        self._hooks.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            for each in self.calls:
                each.abandon()
        finally:
            self._hooks.__exit__(None, None, None)

    def admit(self, call: Callable[[], Result]) -> None:
        """Start a call: it runs up to the first layer, or ends before, and counts if it waits."""
        waiting = Waiting(call, (self._model, self._model.base_model))
        self.calls.append(waiting)
        waiting.advance()
        if not self._is_in_tower(waiting):
            self._count(waiting)
        elif waiting.states is not None:
            self._ahead.append(waiting)
            self._load.add_in_tower(waiting.states)

    def is_full(self) -> bool:
        """Whether no other call fits. To know what they hold, calls leave the tower if need be."""
        if self._ahead and self._load.is_full:
            self._leave_tower()
        return len(self.calls) >= MOST_CALLS or self._load.is_full

    def pass_layers(self) -> None:
        """Bring layers to hand and let the calls through, until all are over."""
        self._leave_tower()
        self._pass(lambda each: each.is_over)

    def _leave_tower(self) -> None:
        self._pass(lambda each: not self._is_in_tower(each))
        self._load.leave_towers()
        for each in self._ahead:
            self._count(each)
        self._ahead.clear()

    def _pass(self, is_done: Callable[[Waiting[Result]], bool]) -> None:
        """Let the calls that are not done pass the layers together, each until it is."""
        place, stops = -1, len(self._layers)
        while live := [each for each in self.calls if not is_done(each)]:
            place = min((each.place for each in live), key=partial(_distance, place, stops))
            layer = self._layers[place]
            with nullcontext() if layer is None else at_hand(layer):
                for each in live:
                    if each.place == place:
                        each.advance()
                        give_back()

    def _is_in_tower(self, call: Waiting[Result]) -> bool:
        return not call.is_over and call.place > len(self._decoder)

    def _count(self, call: Waiting[Result]) -> None:
        if call.states is not None:
            self._load.add(call.states)


def _distance(place: int, stops: int, other: int) -> int:
    """Steps from one stop to another in the round; a whole round to itself."""
    return (other - place - 1) % stops


def _size(item: object) -> int:
    return len(item) if isinstance(item, Sized) else 1
