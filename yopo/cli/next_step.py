"""What to type next: the last line on stderr of a command that was typed by hand."""

from __future__ import annotations

import shlex

from yopo.support.console import note

YOURS = "PAIRS"
"""Stands for the user's held-out pairs."""


def suggest_next(*words: object, then: str = "") -> None:
    """Print a command, quoted for a shell, unless one of its inputs came from a pipe.

    Args:
        *words: The command's words, without ``yopo``.
        then: What follows the command, as the rest of a sentence.
    """
    texts = [str(word) for word in words]
    if "-" in texts:
        return
    note(f"next: {shlex.join(['yopo', *texts])}{then}")


def suggest_loading(directory: object, budget: float | None = None) -> None:
    """Print how to load a checkpoint in Python."""
    at = "" if budget is None else f", budget={budget:g}"
    note(f"next: model = yopo.load({str(directory)!r}{at})  # in Python")
