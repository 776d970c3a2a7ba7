"""A little SVG: elements with escaped text and short numbers, scales and their ticks.

Colors are classes, which the page's style sheet defines for light, dark and print; so no element
has a style of its own, and the page can forbid them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 400
"""Width of every chart in its own units, in which text has 12: legible on a phone unscaled."""

_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def clean(text: object) -> str:
    """Text without characters that HTML forbids or that reorder what is around them.

    They are shown as escapes. Line breaks and tabs stay.
    """
    return _CONTROLS.sub(lambda it: it.group().encode("unicode_escape").decode(), str(text))


def shorten(text: str, most: int) -> str:
    """Text of at most ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


class Svg:
    """A drawing under construction.

    Args:
        height: In units of ``WIDTH``.
        label: What it shows, for those who do not see it.
        kind: Its class.
    """

    def __init__(self, height: float, label: str, kind: str = "chart"):
        self.height, self._label, self._kind = height, label, kind
        self._parts: list[str] = []

    def add(
        self, tag: str, *, title: str | None = None, text: str | None = None, **at: object
    ) -> None:
        """Add an element; attributes as ``text_anchor`` or ``class_``, None leaves one out."""
        named = "".join(
            f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
            for name, value in at.items()
            if value is not None
        )
        inside = "" if title is None else f"<title>{escape(clean(title))}</title>"
        inside += "" if text is None else escape(clean(text))
        self._parts.append(f"<{tag}{named}>{inside}</{tag}>")

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str, title: str | None = None
    ) -> None:
        """Add a rectangle."""
        self.add("rect", x=x, y=y, width=width, height=height, class_=kind, title=title)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Add a line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)

    def text(
        self, x: float, y: float, text: str, kind: str = "", anchor: str | None = None
    ) -> None:
        """Add a line of text."""
        self.add("text", x=x, y=y, class_=kind or None, text_anchor=anchor, text=text)

    def circle(self, x: float, y: float, r: float, kind: str, title: str | None = None) -> None:
        """Add a circle."""
        self.add("circle", cx=x, cy=y, r=r, class_=kind, title=title)

    def polyline(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Add connected lines."""
        found = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self.add("polyline", points=found, class_=kind)

    def markup(self) -> Markup:
        """The finished drawing."""
        head = (
            f'<svg class="{escape(self._kind)}" viewBox="0 0 {WIDTH} {_number(self.height)}" '
            f'role="img" aria-label="{escape(clean(self._label))}">'
        )
        return Markup(head + "".join(self._parts) + "</svg>")


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic scale from values to positions.

    Attributes:
        low, high: The values at its ends, low < high.
        start, end: Their positions.
        is_log: Whether it is logarithmic; then 0 < low.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value; those outside are drawn at the ends."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """A few round values between the ends."""
        if self.is_log:
            low, high = (math.log10(value) for value in (self.low, self.high))
            powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
            found = [10.0**power for power in powers]
            return found[:: max(1, math.ceil(len(found) / 5))]
        step = _round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def decades(values: Sequence[float]) -> tuple[float, float]:
    """The powers of ten around positive values, at least one decade apart."""
    low = 10.0 ** math.floor(math.log10(min(values)))
    high = 10.0 ** math.ceil(math.log10(max(values)))
    return low, high if high > low else 10 * low


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= step * 0.999)


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _value(value: object) -> str:
    return _number(value) if isinstance(value, int | float) else escape(clean(value))
