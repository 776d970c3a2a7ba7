"""Human-readable numbers."""

from __future__ import annotations


def flops(count: float) -> str:
    """FLOPs with a decimal prefix: ``7.63 T``."""
    return _scaled(count, ("", "k", "M", "G", "T", "P"), digits=2).strip()


def num_bytes(count: float) -> str:
    """Bytes with a decimal prefix: ``262 kB``, ``13.5 GB``."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"), digits=1)


def share(value: float) -> str:
    """A ratio as a percentage with one decimal: ``24.5 %``."""
    return f"{100 * value:.1f} %"


def _scaled(count: float, prefixes: tuple[str, ...], *, digits: int) -> str:
    power = 0
    while count >= 1000 and power + 1 < len(prefixes):
        count, power = count / 1000, power + 1
    return f"{count:.{digits if power else 0}f} {prefixes[power]}"
