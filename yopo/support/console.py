"""Everything a command prints besides its result: notes, warnings and progress, on stderr.

stdout is for results, so that ``yopo calibrate -o - | yopo inspect -`` works. rich is only imported
on first use, so that ``yopo --help`` does not pay for it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

from yopo.support.errors import printable
from yopo.support.launched import is_first

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Item = TypeVar("Item")

PERIOD = 30.0
"""Seconds between two lines about work in progress where no bar can be shown."""

_quiet = False
_verbose = False
_bar_is_up = False
_step_is_up = False


def set_quiet(quiet: bool) -> None:
    """Silence notes and progress (warnings and errors still show)."""
    global _quiet
    _quiet = quiet or not is_first()


def set_verbose(verbose: bool) -> None:
    """Show what is usually shortened."""
    global _verbose
    _verbose = verbose


def is_verbose() -> bool:
    """Whether what is usually shortened is to be shown."""
    return _verbose


def duration(seconds: float) -> str:
    """A time as minutes and seconds, with hours if there are any: ``1:05``, ``2:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def step(message: str) -> None:
    """Report a step of long work unless quiet; on a terminal it replaces the one before."""
    global _step_is_up
    if _quiet or (_bar_is_up and sys.stderr.isatty()):
        return
    if not sys.stderr.isatty():
        print(printable(message), file=sys.stderr, flush=True)
        return
    print(f"\r\x1b[K{printable(message)}", end="", file=sys.stderr, flush=True)
    _step_is_up = True


def _clear_step() -> None:
    """Remove the last step from a terminal before something else is printed."""
    global _step_is_up
    if _step_is_up:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    _step_is_up = False


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def note(*lines: str) -> None:
    """Print lines on stderr unless quiet; line breaks inside a line are escaped."""
    if not _quiet:
        _clear_step()
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a warning on stderr, even when quiet; of several processes, the first does."""
    if not is_first():
        return
    _clear_step()
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def show(renderable: RenderableType) -> None:
    """Print a rich renderable (such as a table of candidates) on stderr unless quiet."""
    if not _quiet:
        _clear_step()
        _stderr().print(renderable)


def track(items: Iterable[Item], *, label: str, total: int | None, unit: str) -> Iterator[Item]:
    """Yield ``items`` with a progress bar (rate, ETA) on stderr if that is a terminal.

    Only one bar is shown at a time: nested calls show none.

    Args:
        items: Iterated over; an item may be a sized batch (its ``len`` advances the bar).
        label: What is being done.
        total: Number of units expected, or None when unknown.
        unit: The unit that is counted, in the plural (``pairs``).

    Yields:
        The items, unchanged and in order.
    """
    global _bar_is_up
    if _quiet or _bar_is_up:
        yield from items
        return
    if not sys.stderr.isatty():  # no bars in log files
        yield from _reporting(items, label, total, unit)
        return
    _clear_step()
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(label),
        BarColumn(20),
        TextColumn("{task.completed:.0f}/{task.fields[of]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    _bar_is_up = True
    try:
        with Progress(*columns, console=_stderr(), transient=True) as progress:
            task = progress.add_task(
                label, total=total, rate="", of="?" if total is None else total
            )
            for item in items:
                yield item
                progress.advance(task, len(item) if hasattr(item, "__len__") else 1)
                speed = progress.tasks[0].speed
                progress.update(task, rate=f"{speed:.1f} {unit}/s" if speed else "")
    finally:
        _bar_is_up = False


def _reporting(items: Iterable[Item], label: str, total: int | None, unit: str) -> Iterator[Item]:
    """Yield ``items`` and print a line now and then, if they take long."""
    started = said = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += len(item) if isinstance(item, Sized) else 1
        now = time.monotonic()
        if now - said < PERIOD or done == total:
            continue
        said, passed = now, now - started
        left = ""
        if total is not None and done:
            left = f", about {duration(passed * (total - done) / done)} left"
        of = "" if total is None else f" of {total}"
        note(f"{label}: {done}{of} {unit} in {duration(passed)}{left}")
