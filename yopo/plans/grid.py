"""The grid of an image's visual tokens, and the blocks of rows that attend to one another.

No torch here: the runtime splits its work into these blocks and ``flops.py`` counts the same ones,
so that the predicted work is the executed work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ROWS_PER_BLOCK = 3
"""Image rows per attention call. On CPU with 24 x 24 tokens, 32 heads and three rows above, one
call per 3 rows took 36 ms, per row 42 ms, per 8 rows 41 ms, a dense mask 77 ms (one thread)."""

TOKENS_PER_BLOCK = 64
"""Minimum queries per call: on small grids the calls, not the products, take the time."""


TOKENS_PER_SHARED_BLOCK = 128
"""Queries per call where the samples of a batch hold different grids."""

TOKENS_PER_LARGE_BLOCK = 1024
"""Queries per call where calls cost more than what they compute in vain (on a GPU)."""


@dataclass(frozen=True)
class Grid:
    """Rows and columns of one image's visual tokens, in row-major order."""

    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        """Number of visual tokens of the image."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Block:
    """Visual queries ``[start, stop)`` against visual keys ``[key_start, key_stop)``.

    Positions are along the visual stream (all images of a sample, concatenated).
    """

    image: int
    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def pairs(self) -> int:
        """Query-key products of one head in this block."""
        return (self.stop - self.start) * (self.key_stop - self.key_start)


def row_blocks(
    grids: Sequence[Grid],
    radius: int | None,
    bidirectional: bool,
    tokens: int | None = None,
) -> Iterator[Block]:
    """Cut the visual self-attention of one sample into blocks of image rows.

    Args:
        grids: The sample's images in prompt order.
        radius: Chebyshev radius of the neighborhood; None means every earlier visual token,
            those of earlier images included.
        bidirectional: Whether later neighbors in the same image count as well.
        tokens: Minimum queries per block; None: ``TOKENS_PER_BLOCK``.

    Yields:
        Blocks that cover every query once, each with all keys that its queries may attend
        (a mask inside the block excludes the rest).
    """
    least = TOKENS_PER_BLOCK if tokens is None else tokens
    offset = 0
    for image, grid in enumerate(grids):
        step = max(ROWS_PER_BLOCK, -(-least // grid.cols))
        for top in range(0, grid.rows, step):
            bottom = min(grid.rows, top + step)
            if radius is None:
                first = 0
                last = offset + (grid.tokens if bidirectional else bottom * grid.cols)
            else:
                below = min(grid.rows, bottom + radius) if bidirectional else bottom
                first = offset + max(0, top - radius) * grid.cols
                last = offset + below * grid.cols
            yield Block(image, offset + top * grid.cols, offset + bottom * grid.cols, first, last)
        offset += grid.tokens


def shared_blocks(
    rows: Sequence[Sequence[Grid]],
    radius: int | None,
    bidirectional: bool,
    tokens: int | None = None,
) -> Iterator[Block]:
    """Cut the visual self-attention of a batch whose samples hold different grids.

    Blocks then cut across image rows; each spans the keys that any sample's queries need.

    Args:
        rows: The images of every sample.
        radius: As in ``row_blocks``.
        bidirectional: As in ``row_blocks``.
        tokens: Queries per block; None: ``TOKENS_PER_SHARED_BLOCK``.

    Yields:
        Blocks that cover every position of the longest visual stream once.
    """
    cuts = [block for grids in rows for block in row_blocks(grids, radius, bidirectional)]
    longest = max(sum(grid.tokens for grid in grids) for grids in rows)
    size = TOKENS_PER_SHARED_BLOCK if tokens is None else tokens
    for start in range(0, longest, size):
        stop = min(longest, start + size)
        met = [cut for cut in cuts if cut.start < stop and cut.stop > start]
        first = min(start, *(cut.key_start for cut in met))
        last = max(stop, *(cut.key_stop for cut in met))
        yield Block(0, start, stop, first, last)


def window_pairs(grids: Sequence[Grid], radius: int | None) -> int:
    """Visual query-key pairs in the paper's convention, which does not discount causality.

    A neighborhood counts as whole rows (``2 r + 1`` of them, fewer at the border), because kernels
    multiply whole rows: 24 x 24 tokens at radius 2 are 65 664 pairs of 331 776.
    """
    if radius is None:
        return sum(grid.tokens for grid in grids) ** 2
    pairs = 0
    for grid in grids:
        reach = min(radius, grid.rows - 1)
        near = (2 * reach + 1) * grid.rows - reach * (reach + 1)  # the border rows have fewer
        pairs += near * grid.cols**2
    return pairs
