"""How visual keys and values may lie in the cache: levels of bits, groups, bytes. No torch."""

from __future__ import annotations

LEVELS = (8, 4, 2)
"""Bits of a quantised number."""

MOST_IN_GROUP = 128
"""Numbers of one token and KV head that share a step, at most."""

STEP_BYTES = 1
"""Of a step: the code of a power of two, in eighths."""


def group_width(head_dim: int) -> int:
    """Numbers that share a step: the largest divisor of a head's width within the limit."""
    return next(
        width for width in range(min(head_dim, MOST_IN_GROUP), 0, -1) if head_dim % width == 0
    )


def packed_width(head_dim: int, bits: int) -> int:
    """Bytes that hold the packed numbers of one token and KV head."""
    return -(-head_dim * bits // 8)


def bytes_of_head(head_dim: int, bits: int | None, itemsize: int) -> int:
    """Bytes of one token's key, or value, in one KV head.

    Args:
        head_dim: Width of a head.
        bits: Of a number; None: numbers of ``itemsize`` bytes, and no steps.
        itemsize: Bytes of a number that is not quantised.
    """
    if bits is None:
        return head_dim * itemsize
    steps = STEP_BYTES * (head_dim // group_width(head_dim))
    return packed_width(head_dim, bits) + steps
