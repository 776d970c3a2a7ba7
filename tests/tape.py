"""A recorder that does on a CPU what a CUDA graph does on a GPU.

It writes down every operation with the very tensors that it reads and writes, and does the same
again when it is replayed: no Python runs, memory stays where it was, and what the tensors hold then
is what counts. As during a capture, nothing may depend on the value of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yopo.runtime.replay import Recordings

_ASKS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "unique")
_BRINGS = ("lift_fresh", "lift_fresh_copy")


class CannotBeCapturedError(RuntimeError):
    """A GPU would have to wait for the host, or the host for the GPU."""


class _Writing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        by_mask = name in ("index", "index_put") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if name in _ASKS or name in _BRINGS or by_mask:
            raise CannotBeCapturedError(f"{func} in a capture")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found


class Tape:
    """A recorder for :class:`Recordings`."""

    def suits(self, states: torch.Tensor) -> bool:
        return True

    @contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        yield

    def forget(self) -> None:
        pass

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        with _Writing() as tape:
            function()
        self.calls = calls = tape.calls

        def replay() -> None:
            for func, args, kwargs, held in calls:
                found = func(*args, **kwargs)
                if any(each.alias_info is not None for each in func._schema.returns):
                    continue  # a view, or written in place
                for own, new in zip(tree_leaves(held), tree_leaves(found), strict=True):
                    if isinstance(own, torch.Tensor):
                        own.copy_(new)

        return replay

    def borrowed(self) -> set[int]:
        """Addresses of memory that the last function used and did not allocate itself."""
        own, found = set(), set()
        for func, args, kwargs, made in self.calls:
            found |= _addresses((args, kwargs)) - own
            if not any(each.alias_info is not None for each in func._schema.returns):
                own |= _addresses(made)
        return found


def _addresses(values: object) -> set[int]:
    tensors = (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))
    return {each.untyped_storage().data_ptr() for each in tensors}


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are pruned on a CPU are recorded as on a GPU."""
    monkeypatch.setattr("yopo.runtime.decoder.Recordings", lambda: Recordings(Tape()))


@pytest.fixture
def at_once(tape: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prefill of every kind is recorded, so none runs without a recording."""
    monkeypatch.setattr(Recordings, "_is_due", lambda self, kind: True)


def replays_of(model: Any) -> int:
    """How many prefills of a pruned model were replayed."""
    return model.get_decoder().yopo.recordings.replays
