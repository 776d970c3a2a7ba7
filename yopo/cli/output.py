"""Results on stdout: tables in color on a terminal, plain text in a pipe, or one JSON document."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yopo.support.files import PAGE_MARK

if TYPE_CHECKING:
    from rich.console import RenderableType

_HTML_WIDTH = 100

_ASCII = str.maketrans("█▏▎▍▌▋▊▉▁▂▃▄▅▆▇░▒▓…", "#-------_.-~=+%oO@.")
"""What stands for blocks and the like where there are none: steps of one scale stay apart."""


def is_ascii(encoding: str | None) -> bool:
    """Whether a terminal shows ASCII only: by its encoding, or as ``LC_ALL`` says, which Python
    overrules by UTF-8."""
    is_unicode = (encoding or "utf-8").lower().startswith("utf")
    return not is_unicode or os.environ.get("LC_ALL") in ("C", "POSIX")


def print_report(report: RenderableType) -> None:
    """Print a rich renderable at the terminal's width (80 columns in a pipe)."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:  # rich would exit by itself on a closed pipe
        console.print(report)
    text = capture.get()
    if is_ascii(sys.stdout.encoding):
        text = text.translate(_ASCII).encode("ascii", "replace").decode()
    if not console.is_terminal:
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    sys.stdout.write(text)


def json_text(document: dict[str, Any]) -> str:
    """A JSON document as text; what is no Unicode stays an escape."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def html(report: RenderableType, *, title: str) -> str:
    """Render a report as a self-contained HTML page."""
    import io
    from html import escape

    from rich.console import Console
    from rich.terminal_theme import MONOKAI

    console = Console(
        file=io.StringIO(),
        record=True,
        width=_HTML_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(report)
    page = console.export_html(theme=MONOKAI)
    head = f"<head>\n{PAGE_MARK}\n<title>{escape(Path(title).name)}</title>"
    return page.replace("<head>", head, 1)
