"""Forwards of one decoder that pass its layers together, so that each layer is fetched once.

Where layers stay on disk, every forward reads all of them. So the loops over batches and layers are
swapped: the forwards of a window wait at each layer until all are there, the layer is brought to
hand once, each runs through it in turn, and it goes away. They are the ordinary forwards, each in a
thread that keeps its place while the others run. One runs at a time, in the order of the items: at
every layer, whatever is computed and added up is what a plain loop computes, bit for bit.
``generate`` goes in lockstep, so that one pass over the layers is a step of all unfinished answers.

A stock decoder is stopped by hooks on its layers; a decoder with a loop of its own iterates over
``each_layer``. Where layers are resident there are no threads, and the loop is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from yopo.models.baton import Waiting, stopping
from yopo.models.family import shape_of
from yopo.models.offloaded import at_hand, is_offloaded
from yopo.models.window import Holding, forced_memory, free_for_states
from yopo.support.memory import give_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_CALLS = 256
"""Most calls of a window, each of which is a thread."""


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
    holding = Holding(shape_of(model.config), new_tokens)
    rest = enumerate(items)
    while True:
        window: _Window[Result] = _Window(model, holding, memory)
        size = 0
        with window:
            while not window.is_full and (found := next(rest, None)) is not None:
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
        holding: What each of them holds.
        memory: Bytes for all of them; None: what the device of the first one has.
    """

    def __init__(self, model: PreTrainedModel, holding: Holding, memory: int | None):
        self.calls: list[Waiting[Result]] = []
        self.is_full = False
        self._model, self._layers = model, model.get_decoder().layers
        self._holding, self._memory = holding, memory
        self._held = self._largest = self._tokens = 0

    def __enter__(self) -> _Window[Result]:
        self._hooks = stopping(self._layers)
        self._hooks.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._hooks.__exit__(None, None, None)
        for each in self.calls:
            if not each.is_over:
                each.abandon()

    def admit(self, call: Callable[[], Result]) -> None:
        """Start a call: it runs up to the first layer, or ends before, and counts if it waits."""
        waiting = Waiting(call, (self._model, self._model.base_model))
        self.calls.append(waiting)
        waiting.advance()
        if waiting.states is None:
            return
        if self._memory is None:
            self._memory = free_for_states(waiting.states.device)
        held = self._holding.of(waiting.states)
        self._held, self._largest = self._held + held, max(self._largest, held)
        self._tokens += waiting.states.shape[:2].numel()
        most = self._holding.most_tokens(waiting.states.device)
        is_long = len(self.calls) >= MOST_CALLS or (most is not None and self._tokens >= most)
        self.is_full = is_long or self._held + self._largest > self._memory

    def pass_layers(self) -> None:
        """Bring layers to hand and let the calls through, until all are over."""
        place, stops = -1, len(self._layers) + 1
        while live := [each for each in self.calls if not each.is_over]:
            place = min((each.place for each in live), key=partial(_distance, place, stops))
            here = [each for each in live if each.place == place]
            with at_hand(self._layers[place]) if place < len(self._layers) else nullcontext():
                for each in here:
                    each.advance()
                    give_back()


def _distance(place: int, stops: int, other: int) -> int:
    """Steps from one stop to another in the round; a whole round to itself."""
    return (other - place - 1) % stops


def _size(item: object) -> int:
    return len(item) if isinstance(item, Sized) else 1
