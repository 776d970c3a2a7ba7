"""The compared plans, a line each: best first, names cut to the width of the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from yopo.report import units
from yopo.report.plan_tables import plain_table, template_of

_PADDING = 2
"""Characters between two columns."""

_LEAST = 8
"""Characters that are left of a name at least."""

_KIND = (10, 24)
"""Least and most characters of the worst kind and its KL; a fifth of the width between these."""


class CandidateTable:
    """A rich renderable of candidates.

    Args:
        candidates: From a plan's provenance: template, compensation, budget, kl, and
            if measured whole_answers, worst_kind, worst_kl.
        pairs: Number of held-out pairs that the KL was measured on, if known.
    """

    def __init__(self, candidates: Sequence[Mapping[str, Any]], pairs: int | None = None):
        self.candidates, self.pairs = candidates, pairs
        self.has_tail = any("worst_kind" in each for each in candidates)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        least, most = _KIND
        kind_width = min(max(options.max_width // 5, least), most)
        heads = ["", "template", "", "budget", "logit KL"]
        heads += ["answers", "worst kind"] if self.has_tail else []
        rows = [self._cells(rank, each, kind_width) for rank, each in enumerate(self.candidates)]
        room = _room(heads, rows, options.max_width)
        if self.has_tail and room < max(len(row[1]) for row in rows):
            heads, rows = heads[:-1], [row[:-1] for row in rows]  # names tell plans apart
            room = _room(heads, rows, options.max_width)
        table = plain_table()
        for head in heads:
            is_number = head in ("budget", "logit KL", "answers")
            table.add_column(head, justify="right" if is_number else "left", no_wrap=True)
        for rank, row in enumerate(rows):
            row[1] = _cut(row[1], max(room, _LEAST))
            table.add_row(*map(Text, row), style="" if rank else "bold")
        yield ""
        yield table
        yield from (Text(f"  {line}", "dim") for line in self._notes(heads))

    def _cells(self, rank: int, each: Mapping[str, Any], kind_width: int) -> list[str]:
        kl = "not measured" if each["kl"] is None else f"{each['kl']:.3g}"
        cells = ["" if rank else ">", _short(str(template_of(each))), str(each["compensation"])]
        cells += [units.share(each["budget"]), kl]
        if not self.has_tail:
            return cells
        if "worst_kind" not in each:
            return [*cells, "", ""]
        worst = _cut(f"{each['worst_kl']:.3g} {each['worst_kind']}", kind_width)
        return [*cells, units.share(each["whole_answers"]), worst]

    def _notes(self, heads: Sequence[str]) -> list[str]:
        notes = [f"on {self.pairs} held-out pairs"] if self.pairs else []
        if self.has_tail:
            worst = "; worst kind: with its KL" if "worst kind" in heads else ""
            notes.append(f"answers: the same whole ones{worst}")
        return notes


def _room(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """Characters that the other columns leave of a width to names."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return width - sum(widths) + widths[1] - _PADDING * len(widths)


def _short(name: str) -> str:
    """A template's name without what most of them share."""
    return name.replace("allocated, visual weight", "weight")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
