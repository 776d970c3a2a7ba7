"""User-facing errors: one sentence and one remedy, never a traceback.

Library code raises these for bad input; the command line prints them on stderr and exits with
``exit_code``. Programming errors are ordinary Python exceptions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MAX_SENTENCE = 1000
"""Maximum characters of a message; longer ones (with an endless name) are cut in the middle."""

_COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys instead of showing: control characters, direction marks."""


class YopoError(Exception):
    """A user-facing failure: what, where, expected, found, and what to do about it.

    Args:
        message: One sentence that names the file, key or model concerned.
        remedy: What the user can do, in the imperative; printed on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None):
        super().__init__(message)
        self.message = printable(message)
        self.remedy = None if remedy is None else printable(remedy)

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message


class PlanError(YopoError):
    """An invalid plan or configuration file."""


class ModelError(YopoError):
    """A model that is unknown, unreachable, unsupported, or not the one a plan was made for."""


class DataError(YopoError):
    """Image-question pairs that cannot be read or hold nothing to measure."""


class CheckpointError(YopoError):
    """A checkpoint directory with missing, corrupt or unsuitable files."""


class OutputError(YopoError):
    """A result that cannot be written to the requested place."""


def printable(text: str) -> str:
    """Make text safe to print: control characters are shown as escapes.

    Names in untrusted files may hold any of them; a line break could forge a message.
    """
    if len(text) > MAX_SENTENCE:
        half = MAX_SENTENCE // 2
        text = f"{text[:half]}...{text[-half:]}"
    return _COMMANDS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def suggest(name: str, known: Iterable[str]) -> str:
    """Remedy for an unknown name: the closest known ones, or all of them.

    Returns:
        ``Did you mean 'a' or 'b'?`` or ``Known: a, b, c.``
    """
    names = sorted(known)
    close = difflib.get_close_matches(name[:100], names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(match) for match in close)}?"
    return f"Known: {', '.join(names)}."
