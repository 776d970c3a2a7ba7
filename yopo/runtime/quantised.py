"""Numbers in few bits: symmetric levels around zero, one step per group, packed in bytes.

A group of numbers x has ``2^bits`` equidistant levels, ``x ~ s (u - (2^bits - 1) / 2)`` with ``u``
in ``0 .. 2^bits - 1``: as many below zero as above, none at it, so that no level is lost at 2 bits.
The step s is a power of two in eighths, of which a byte holds the code. The widest step takes in
the largest number; of it and a few narrower ones, which clip large numbers for the sake of all the
others, the one of the least squared error is used. A byte holds the numbers of several spans of a
head's width, not neighbors, so that unpacking writes whole spans.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from yopo.plans.kv_storage import group_width, packed_width

FINENESS = 8
"""Steps from one power of two to the next."""

SMALLEST_STEP = -20
"""Code 0 stands for a step of 0, code c for ``2^(c / FINENESS + SMALLEST_STEP)``."""

NARROWER = {8: (0,), 4: (0, 3), 2: (0, 3, 6)}
"""Steps tried per number of bits: how many codes below the widest. The more levels there are, the
less there is to gain by clipping."""

BLOCK_BYTES = 1 << 20
"""Of unpacked float32 numbers at a time, so that they stay in the cache of a core."""


def middle(bits: int) -> float:
    """The code that would stand for zero: half a step between two levels."""
    return ((1 << bits) - 1) / 2


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What quantised numbers are computed in: float32, or a finer model's own."""
    return torch.promote_types(dtype, torch.float32)


def quantise(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise and pack.

    Args:
        values: (..., head_dim) floats.
        bits: 8, 4 or 2.

    Returns:
        (..., packed) uint8, and (..., groups) uint8 codes of steps.
    """
    head_dim = values.shape[-1]
    grouped = values.to(exact_dtype(values.dtype)).unflatten(-1, (-1, group_width(head_dim)))
    widest = _widest_steps(grouped, bits)
    tried = [(widest - each).clamp(min=0) for each in NARROWER[bits]]
    chosen = tried[0]
    if len(tried) > 1:
        errors = torch.stack([_squared_error(grouped, each, bits) for each in tried])
        chosen = torch.stack(tried).gather(0, errors.argmin(dim=0, keepdim=True))[0]
    codes = _in_steps(grouped, chosen, bits).add_(middle(bits)).to(torch.uint8)
    return _pack(codes.flatten(-2), bits), chosen.to(torch.uint8)


def steps_of(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The steps that (...) codes stand for."""
    steps = torch.exp2(codes.to(dtype) / FINENESS + SMALLEST_STEP)
    return steps.masked_fill_(codes == 0, 0.0)


def _widest_steps(grouped: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., groups) codes of the smallest steps whose levels reach the largest number."""
    step = grouped.abs().amax(dim=-1) / middle(bits)
    codes = (FINENESS * (step.log2() - SMALLEST_STEP)).ceil()
    return codes.clamp(0, 255)


def _in_steps(grouped: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., groups, width) nearest levels, as multiples of their steps."""
    steps = steps_of(codes, grouped.dtype).masked_fill_(codes == 0, 1.0)
    levels = (grouped / steps[..., None]).floor_().add_(0.5)
    return levels.clamp_(-middle(bits), middle(bits))


def _squared_error(grouped: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., groups) squared distance of numbers to their levels."""
    read = _in_steps(grouped, codes, bits).mul_(steps_of(codes, grouped.dtype)[..., None])
    return read.sub_(grouped).square_().sum(dim=-1)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., head_dim) codes -> (..., packed): span i of the width in bits i of every byte."""
    if bits == 8:
        return codes
    width = packed_width(codes.shape[-1], bits)
    packed = codes.new_zeros(*codes.shape[:-1], width)
    for number, span in enumerate(codes.split(width, dim=-1)):
        packed[..., : span.shape[-1]] |= span << (bits * number)
    return packed


def _unpack_into(numbers: torch.Tensor, packed: torch.Tensor, bits: int) -> None:
    """Write the codes of (..., packed) bytes as floats into (..., head_dim) numbers."""
    if bits == 8:
        numbers.copy_(packed)
        return
    mask = (1 << bits) - 1
    for number, span in enumerate(numbers.split(packed.shape[-1], dim=-1)):
        some = packed if number == 0 else packed >> (bits * number)
        is_last = bits * (number + 1) == 8
        span.copy_((some if is_last else some & mask)[..., : span.shape[-1]])


def dequantise(
    packed: torch.Tensor, codes: torch.Tensor, bits: int, head_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """(..., head_dim) numbers of what :func:`quantise` returned, in ``exact_dtype(dtype)``."""
    numbers = packed.new_empty(*packed.shape[:-1], head_dim, dtype=exact_dtype(dtype))
    _unpack_into(numbers, packed, bits)
    grouped = numbers.sub_(middle(bits)).unflatten(-1, (codes.shape[-1], -1))
    return grouped.mul_(steps_of(codes, numbers.dtype)[..., None]).flatten(-2)


def scores(
    queries: torch.Tensor, packed: torch.Tensor, codes: torch.Tensor, bits: int
) -> torch.Tensor:
    """Products of queries with quantised keys, which are unpacked block by block.

    A byte shifted by i numbers is its number i and the later ones, those times powers of
    ``2^bits``. Nothing has to be masked: combinations of the queries' spans take the rest away.

    Args:
        queries: (rows, queries, head_dim) in ``exact_dtype``; a row is a KV head of a batch row.
        packed: (rows, keys, packed).
        codes: (rows, keys, 1) of steps: one group alone.
        bits: Of the keys.

    Returns:
        (rows, queries, keys).
    """
    rows, count, _ = queries.shape
    own = list(_spans(queries, packed.shape[-1], bits).unbind(2))
    own = [own[0], *(one - (1 << bits) * before for before, one in pairwise(own))]
    found = queries.new_empty(rows, count, packed.shape[1])
    for (some, keys), number, shifted in _blocks(packed, bits, queries.dtype):
        product = own[number][some] @ shifted.transpose(1, 2)
        if number:
            found[some, :, keys] += product
        else:
            found[some, :, keys] = product
    found -= middle(bits) * queries.sum(dim=-1, keepdim=True)
    return found.mul_(steps_of(codes, found.dtype).transpose(1, 2))


def mixture(
    weights: torch.Tensor, packed: torch.Tensor, codes: torch.Tensor, bits: int, head_dim: int
) -> torch.Tensor:
    """Sums of quantised values under attention weights, unpacked block by block as in ``scores``.

    Args:
        weights: (rows, queries, keys) in ``exact_dtype``.
        packed: (rows, keys, packed).
        codes: (rows, keys, 1) of steps: one group alone.
        bits: Of the values.
        head_dim: Width of a head.

    Returns:
        (rows, queries, head_dim).
    """
    rows, count, _ = weights.shape
    weights = weights * steps_of(codes, weights.dtype).transpose(1, 2)
    sums = weights.new_zeros(rows, count, 8 // bits, packed.shape[-1])
    for (some, keys), number, shifted in _blocks(packed, bits, weights.dtype):
        sums[some, :, number] += weights[some, :, keys] @ shifted
    sums[:, :, :-1] -= (1 << bits) * sums[:, :, 1:]
    found = sums.flatten(2)[..., :head_dim]
    return found - middle(bits) * weights.sum(dim=-1, keepdim=True)


def _spans(queries: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """(..., head_dim) -> (..., spans, width), zeros where the last span is shorter."""
    missing = 8 // bits * width - queries.shape[-1]
    return torch.nn.functional.pad(queries, (0, missing)).unflatten(-1, (-1, width))


def _blocks(
    packed: torch.Tensor, bits: int, dtype: torch.dtype
) -> Iterator[tuple[tuple[slice, slice], int, torch.Tensor]]:
    """Cut (rows, keys, packed) bytes into blocks: (their place, by how many numbers they are
    shifted, the shifted bytes as floats), for every number of a byte.

    The floats lie in one buffer, which the next ones overwrite. Off the CPU, all are one block.
    """
    rows, length, width = packed.shape
    step, size = rows, length
    if packed.device.type == "cpu":
        most = max(1, BLOCK_BYTES // (4 * width))
        size = -(-length // -(-length // most))
        step = max(1, most // size)
    buffer = packed.new_empty(min(step, rows) * size * width, dtype=dtype)
    for first in range(0, rows, step):
        for start in range(0, length, size):
            place = (slice(first, min(first + step, rows)), slice(start, min(start + size, length)))
            some = packed[place]
            numbers = buffer[: some.numel()].view(some.shape)
            for number in range(8 // bits):
                numbers.copy_(some >> (bits * number) if number else some)
                yield place, number, numbers
