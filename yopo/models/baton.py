"""Calls in threads of their own of which one runs at a time: the one that holds the baton.

A thread is only the place where a call waits: in the middle of a forward, before the next layer.
What torch and Python keep per thread (gradients off, context variables, the CUDA device and
stream, the number of CPU threads) is the caller's in each of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")
Layer = TypeVar("Layer", bound=nn.Module)

_OWN: ContextVar[Waiting | None] = ContextVar("yopo_baton", default=None)
"""The call whose thread this is."""


class Abandoned(BaseException):
    """Ends a call whose result nobody waits for any more; not an error that a call may handle."""


class Waiting(Generic[Result]):
    """A call that stops at every layer of the decoder until it is told to go on.

    Args:
        call: Runs the model, once or several times.
        modules: Where a forward may leave what its next step needs.

    Attributes:
        place: The layer that it waits for, or the number of layers after the last one.
        states: (batch, sequence, hidden) input of that layer; None after the last one.
        is_over: Whether the call has returned or failed.
    """

    def __init__(self, call: Callable[[], Result], modules: Iterable[nn.Module] = ()):
        self.place = 0
        self.states: torch.Tensor | None = None
        self.is_over = False
        self._call, self._notes = call, [_Notes(module) for module in modules]
        self._found: Result | BaseException | None = None
        self._is_abandoned = False
        # Queues rather than locks: a token too many does no harm when a call is abandoned.
        self._go: SimpleQueue[None] = SimpleQueue()
        self._back: SimpleQueue[None] = SimpleQueue()
        settings, run = _settings(), copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run, settings), name="yopo-turn")

    def advance(self) -> None:
        """Run it until it waits for a layer again, or is over.

        Raises:
            BaseException: What the call raised, or what interrupted this thread meanwhile. In
                both cases the call is over, and its thread has ended.
        """
        for notes in self._notes:
            notes.put()
        try:
            if self._thread.ident is None:
                self._thread.start()
            self._go.put(None)
            self._back.get()
        except BaseException:  # Ctrl-C
            self.abandon()
            raise
        finally:
            for notes in self._notes:
                notes.take()
        if self.is_over:
            self._thread.join()
            if isinstance(self._found, BaseException):
                raise self._found

    def abandon(self) -> None:
        """End it where it waits, or at the next layer that it gets to, and wait for that."""
        self._is_abandoned = True
        self._go.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def result(self) -> Result:
        """What the call returned."""
        assert self.is_over and not isinstance(self._found, BaseException)
        return self._found  # type: ignore[return-value]

    def arrive(self, place: int, states: torch.Tensor | None) -> None:
        """Wait; called in the call's own thread."""
        self.place, self.states = place, states
        self._back.put(None)
        self._resume()

    def _resume(self) -> None:
        self._go.get()
        self.states = None
        if self._is_abandoned:
            raise Abandoned

    def _run(self, settings: Callable[[], ExitStack]) -> None:
        try:
            self._resume()
            _OWN.set(self)
            with settings():
                self._found = self._call()
        except BaseException as error:  # advance() raises it
            self._found = error
        self.is_over = True
        self._back.put(None)


class _Notes:
    """What a call leaves on a module for its next step, such as Qwen-VL's ``rope_deltas``.

    Other calls do not see it, and it is gone when the call is over.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._own: dict[str, Any] = {}
        self._shared: dict[str, Any] = {}

    def put(self) -> None:
        """Lay them out."""
        self._shared = self._visible()
        vars(self._module).update(self._own)

    def take(self) -> None:
        """Put them away."""
        held, missing = vars(self._module), object()
        self._own = {
            name: value
            for name, value in self._visible().items()
            if self._shared.get(name, missing) is not value
        }
        for name in self._own:
            if name in self._shared:
                held[name] = self._shared[name]
            else:
                del held[name]

    def _visible(self) -> dict[str, Any]:
        """Attributes other than the module's own administration."""
        held = vars(self._module).items()
        return {name: value for name, value in held if not name.startswith("_")}


def is_in_turns() -> bool:
    """Whether this thread's call waits for its turn at every layer."""
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
def stopping(layers: nn.ModuleList) -> Iterator[None]:
    """Make the forwards of a stock decoder wait for their turns inside the block."""
    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(_before(place), with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        stack.callback(layers[-1].register_forward_hook(_after(len(layers))).remove)
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


def _settings() -> Callable[[], ExitStack]:
    """This thread's settings of torch that others do not share, to be made in another one."""
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def make() -> ExitStack:
        stack = ExitStack()
        torch.set_num_threads(threads)
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if stream is not None:
            stack.enter_context(torch.cuda.device(stream.device))
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return make
