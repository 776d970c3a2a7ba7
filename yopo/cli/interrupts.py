"""Ctrl-C, SIGTERM and SIGHUP: clean up and print one word, whatever a library does with them.

A KeyboardInterrupt inside an import does not always propagate: torch, for one, swallows it or
raises an ImportError instead. So the signal is remembered, and checked after such places.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from yopo.support.durable import SIGNALS

_WORDS: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}

_arrived: int | None = None


@contextmanager
def catching() -> Iterator[None]:
    """Turn the signals into KeyboardInterrupt inside a block."""
    global _arrived
    _arrived, former = None, {}
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler in (signal.default_int_handler, signal.SIG_DFL):  # not if ignored (nohup)
            try:
                former[number] = signal.signal(number, _interrupt)
            except ValueError:  # not the main thread, which alone gets signals
                break
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def raise_if_arrived() -> None:
    """Raise KeyboardInterrupt if a signal arrived in the block, even if something caught it."""
    if _arrived is not None:
        raise KeyboardInterrupt


def outcome() -> tuple[str, int]:
    """An interrupted program's last word, and its exit code: 128 plus the first signal's number."""
    number = signal.SIGINT if _arrived is None else _arrived
    return _WORDS[number], 128 + number


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _arrived
    if _arrived is None:
        _arrived = number
    raise KeyboardInterrupt
