"""Kinds of option values that click does not have: shares in percent, numbers or ``all``, lists."""

from __future__ import annotations

from typing import Any

import click


class Share(click.ParamType):
    """A share as a fraction or in percent: ``0.25`` or ``25%``."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse a share."""
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            self.fail(f"expected a share such as 0.25 or 25%, found '{value}'.", param, ctx)
        return round(number / 100, 12) if text.endswith("%") else number


class Samples(click.ParamType):
    """A number of pairs, or ``all`` of them (None)."""

    name = "samples"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Parse a number of pairs."""
        if value is None or str(value).lower() == "all":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"expected a number of pairs or all, found '{value}'.", param, ctx)


class Listed(click.ParamType):
    """Comma-separated values of another type, as a tuple."""

    def __init__(self, of: click.ParamType):
        self.of, self.name = of, f"{of.name} list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Parse every value."""
        if isinstance(value, tuple):
            return value
        return tuple(self.of.convert(part, param, ctx) for part in str(value).split(","))


class Number(click.ParamType):
    """A finite number, with what was expected in its message."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse a number."""
        try:
            return float(value)
        except ValueError:
            self.fail(f"expected comma-separated numbers, found '{value}'.", param, ctx)
