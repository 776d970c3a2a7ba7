"""Everything a command prints besides its result: notes, warnings and progress, on stderr.

stdout is for results, so that ``yopo calibrate -o - | yopo inspect -`` works. rich is only imported
on first use, so that ``yopo --help`` does not pay for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from yopo.support.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Item = TypeVar("Item")

_quiet = False
_bar_is_up = False


def set_quiet(quiet: bool) -> None:
    """Silence notes and progress (warnings and errors still show)."""
    global _quiet
    _quiet = quiet


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def note(*lines: str) -> None:
    """Print lines on stderr unless quiet; line breaks inside a line are escaped."""
    if not _quiet:
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a warning on stderr, even when quiet."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def show(renderable: RenderableType) -> None:
    """Print a rich renderable (such as a table of candidates) on stderr unless quiet."""
    if not _quiet:
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
    if _quiet or _bar_is_up or not sys.stderr.isatty():  # no bars in log files
        yield from items
        return
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
