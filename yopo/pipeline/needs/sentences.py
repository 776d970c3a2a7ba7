"""Numbers as people say them."""

from __future__ import annotations


def in_bytes(count: float) -> str:
    """Bytes in two digits: ``340 MB``, ``3.4 GB``, ``21 GB``."""
    if count < 0.95e9:
        return f"{max(1, _two_digits(count / 1e6)):g} MB"
    return f"{_two_digits(count / 1e9):g} GB"


def in_time(seconds: float) -> str:
    """A time in two digits: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{max(1, _two_digits(seconds)):.0f} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{_two_digits(seconds / 3600):g} h"


def listed(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
