"""Every unambiguous question about a ticket, with its answer.

One function per kind lists all of a ticket's (question, answer) candidates; the caller picks one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from yopo.demo.glyphs.font import GLYPHS

MAX_LINES = 6
ORDINALS = ("one", "two", "three", "four", "five", "six")

Lines = Sequence[str]
Candidates = list[tuple[str, str]]


def candidates(lines: Lines, kind: str) -> Candidates:
    """List all (question, answer) of one kind that a ticket allows; may be empty.

    Args:
        lines: the symbols of each line, as one string per line.
        kind: one of `KINDS`.
    """
    return _ASKERS[kind](lines)


def _named(lines: Lines) -> list[tuple[str, str]]:
    return [(f"line {ORDINALS[index]}", line) for index, line in enumerate(lines)]


def _first(lines: Lines) -> Candidates:
    return [(f"what is first in {name}?", line[0]) for name, line in _named(lines)]


def _last(lines: Lines) -> Candidates:
    return [(f"what is last in {name}?", line[-1]) for name, line in _named(lines)]


def _lines(lines: Lines) -> Candidates:
    return [("how many lines are there?", ORDINALS[len(lines) - 1])]


def _line(lines: Lines) -> Candidates:
    return [(f"read {name}.", _read(name, line) + ".") for name, line in _named(lines)]


def _all(lines: Lines) -> Candidates:
    """Read all lines: an answer of up to 66 tokens."""
    return [("read the ticket.", ", ".join(_read(*named) for named in _named(lines)) + ".")]


def _read(name: str, line: str) -> str:
    return " ".join([name, *line])


_ASKERS: dict[str, Callable[[Lines], Candidates]] = {
    "first": _first,
    "last": _last,
    "lines": _lines,
    "line": _line,
    "all": _all,
}
KINDS = tuple(_ASKERS)

# The answers a kind can have, each equally likely in pairs; what is read has too many.
ANSWERS: dict[str, tuple[str, ...]] = {
    "first": GLYPHS,
    "last": GLYPHS,
    "lines": ORDINALS[1:],
}
