"""State of one call, kept apart from the modules that all calls share."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

Owner = TypeVar("Owner")
Value = TypeVar("Value")


class PerContext(Generic[Owner, Value]):
    """A value per owner that other threads and asynchronous tasks do not see.

    Modules are shared by all threads that run a model, so state that belongs to one call must not
    be stored on them.
    """

    def __init__(self, name: str):
        self._values: ContextVar[WeakKeyDictionary[Owner, Value] | None] = ContextVar(
            name, default=None
        )

    def get(self, owner: Owner) -> Value | None:
        """The owner's value in this context, or None."""
        values = self._values.get()
        return None if values is None else values.get(owner)

    def set(self, owner: Owner, value: Value | None) -> None:
        """Set the owner's value in this context; None removes it."""
        # A context copied from this one shares the dictionary: never change it in place.
        values = WeakKeyDictionary(self._values.get() or {})
        values.pop(owner, None)
        if value is not None:
            values[owner] = value
        self._values.set(values)
