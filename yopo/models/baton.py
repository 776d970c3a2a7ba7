"""Calls of which one runs at a time: the one that holds the baton.

Each is a greenlet, which keeps its stack where it waits: in the middle of a forward, before the
next layer. All run in the caller's thread, so what is kept per thread (the device and stream, the
pool of CPU threads, the heap) is the caller's. Context variables are each call's own, and while a
call waits, the modes that it has set are not: gradients, inference, torch functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from operator import is_
from typing import Any, Generic, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn, overrides

Result = TypeVar("Result")
Layer = TypeVar("Layer", bound=nn.Module)

_OWN: ContextVar[Waiting | None] = ContextVar("yopo_baton", default=None)
"""The call that is running."""


class Abandoned(BaseException):
    """Ends a call whose result nobody waits for any more; not an error that a call may handle."""


class Waiting(Generic[Result]):
    """A call that stops at every layer of the decoder until it is told to go on.

    Args:
        call: Runs the model, once or several times.
        modules: Where a forward may leave what its next step needs.

    Attributes:
        place: Where it waits (see :func:`stopping`).
        states: Input of the layer that it waits for, (..., hidden); None after the last one.
        is_over: Whether the call has returned or failed.
    """

    def __init__(self, call: Callable[[], Result], modules: Iterable[nn.Module] = ()):
        self.place = 0
        self.states: torch.Tensor | None = None
        self.is_over = False
        self._call, self._notes = call, [_Notes(module) for module in modules]
        self._found: Result | BaseException | None = None
        self._modes = _current_modes()
        self._caller, self._own = getcurrent(), greenlet(self._run)
        self._own.gr_context = copy_context()

    def advance(self) -> None:
        """Run it until it waits for a layer again, or is over.

        Raises:
            BaseException: What the call raised, or what interrupted it; it is over then.
        """
        for notes in self._notes:
            notes.put()
        try:
            self._own.switch()
        finally:
            for notes in self._notes:
                notes.take()
        if self.is_over and isinstance(self._found, BaseException):
            raise self._found

    def abandon(self) -> None:
        """End it where it waits."""
        while self._own:  # started, and not over
            self._own.throw(Abandoned)
        self.is_over = True

    @property
    def result(self) -> Result:
        """What the call returned."""
        assert self.is_over and not isinstance(self._found, BaseException)
        return self._found  # type: ignore[return-value]

    def arrive(self, place: int, states: torch.Tensor | None) -> None:
        """Wait; the call itself does this."""
        self.place, self.states = place, states
        with _modes(*self._modes):
            self._caller.switch()
        self.states = None

    def _run(self) -> None:
        _OWN.set(self)
        try:
            self._found = self._call()
        except BaseException as error:  # advance() raises it
            self._found = error
        self.is_over = True


def _current_modes() -> tuple[bool, bool, int]:
    """Inference mode, gradients, and the number of torch function modes."""
    modes = overrides._len_torch_function_stack()
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), modes


@contextmanager
def _modes(inference: bool, gradients: bool, functions: int) -> Iterator[None]:
    """Go back to former modes inside the block, and to those of now after it."""
    own = _current_modes()
    above = [overrides._pop_mode() for _ in range(own[2] - functions)]
    try:
        with nullcontext() if own[0] == inference else torch.inference_mode(inference):
            torch.set_grad_enabled(gradients)
            yield
    finally:
        torch.set_grad_enabled(own[1])
        for mode in reversed(above):
            overrides._push_mode(mode)


class _Notes:
    """What a call leaves on a module for its next step, such as Qwen-VL's ``rope_deltas``.

    Other calls do not see it, and it is gone when the call is over.
    """

    def __init__(self, module: nn.Module):
        self._held = vars(module)
        self._own: dict[str, Any] = {}
        self._shared: dict[str, Any] = {}

    def put(self) -> None:
        """Lay them out."""
        self._shared = dict(self._held)
        self._held.update(self._own)

    def take(self) -> None:
        """Put them away."""
        held, shared, missing = self._held, self._shared, object()
        if len(held) == len(shared) and all(map(is_, held.values(), shared.values())):
            self._own = {}
            return
        self._own = {
            name: value
            for name, value in held.items()
            if shared.get(name, missing) is not value and not name.startswith("_")
        }
        for name in self._own:
            if name in shared:
                held[name] = shared[name]
            else:
                del held[name]


def is_in_turns() -> bool:
    """Whether the running call waits for its turn at every layer."""
    return _OWN.get() is not None


def each_layer(layers: Iterable[Layer], states: torch.Tensor) -> Iterator[Layer]:
    """The layers of a decoder, each when it is this forward's turn to pass it.

    Args:
        layers: All of them, in order.
        states: (batch, sequence, hidden), the forward's input.

    Yields:
        The layers; at once, unless the forward is one of several that pass them together.
    """
    own = _OWN.get()
    if own is None:
        yield from layers
        return
    place = 0
    for place, layer in enumerate(layers, 1):
        own.arrive(place - 1, states)
        yield layer
    own.arrive(place, None)


@contextmanager
def stopping(layers: Sequence[nn.Module], ahead: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Make forwards wait for their turns inside the block.

    Args:
        layers: A stock decoder's, in order: the places from 0; the next one is after the last. One
            with a loop of its own waits by itself, and does not call the layers that are hooked.
        ahead: Modules that run before them: the places after that.
    """
    last = len(layers)
    places = [*enumerate(layers), *enumerate(ahead, last + 1)]
    with ExitStack() as stack:
        for place, layer in places:
            hook = layer.register_forward_pre_hook(_before(place), with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        stack.callback(layers[-1].register_forward_hook(_after(last)).remove)
        yield


def _before(place: int) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    def arrive(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        own = _OWN.get()
        if own is not None:
            own.arrive(place, args[0] if args else kwargs["hidden_states"])

    return arrive


def _after(place: int) -> Callable[[nn.Module, tuple, object], None]:
    def arrive(module: nn.Module, args: tuple, output: object) -> None:
        own = _OWN.get()
        if own is not None:
            own.arrive(place, None)

    return arrive
