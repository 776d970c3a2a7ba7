"""Training batches for the glyph reader: grids and turns as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2VLProcessor

from demo_training.glyphs_build import END, GRID_TOKENS, IMAGE, IMAGE_END, IMAGE_START, START
from demo_training.rows import ChatForm, RowPacker
from yopo.demo.glyphs.font import GLYPHS
from yopo.demo.glyphs.grids import CELL_SIZE, IMAGE_SIZE, TASK, GlyphGrid
from yopo.demo.glyphs.questions import COLORS, GRID
from yopo.demo.task import Turn

LABELS = {"glyph": 1 + len(GLYPHS), "color": 1 + len(COLORS), "row": GRID, "col": GRID, "first": 2}
"""The labels that `token_labels` gives a visual token, and their numbers of classes."""

_ROW_LENGTH = 256
_TOKEN_SIZE = IMAGE_SIZE // GRID_TOKENS


class Patches:
    """Turns grids into the processor's pixel values, without its per-call overhead."""

    def __init__(self, processor: Qwen2VLProcessor) -> None:
        """Take mean, deviation and the sizes of patches from the processor."""
        images = processor.image_processor
        self.mean = torch.tensor(images.image_mean)
        self.std = torch.tensor(images.image_std)
        self.patch, self.merge = images.patch_size, images.merge_size
        self.frames = images.temporal_patch_size
        self.side = IMAGE_SIZE // self.patch

    def __call__(self, grids: Sequence[GlyphGrid]) -> dict[str, Tensor]:
        """Return pixel_values (patch of all grids, 3 * frames * size * size), image_grid_thw."""
        images = torch.from_numpy(np.stack([grid.pixels() for grid in grids]))
        images = (images / 255 - self.mean) / self.std  # (grid, row, col, channel)
        outer = self.side // self.merge
        split = (outer, self.merge, self.patch)
        blocks = images.view(len(grids), *split, *split, 3)
        # (grid, outer row, outer col, inner row, inner col, channel, pixel row, pixel col)
        blocks = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).flatten(0, 4)
        patches = blocks[:, :, None].expand(-1, -1, self.frames, -1, -1)
        sizes = torch.tensor([[1, self.side, self.side]]).expand(len(grids), -1)
        return {"pixel_values": patches.flatten(1), "image_grid_thw": sizes}


def token_labels(grid: GlyphGrid) -> Tensor:
    """Label each visual token with what is in the cell at its center.

    Returns:
        (token, 5) int64, one column per entry of `LABELS`: glyph and color (0: an empty cell), row
        and col of the cell, and whether the token is the first of the cell's up to four.
    """
    centers = (np.arange(GRID_TOKENS) * _TOKEN_SIZE + _TOKEN_SIZE // 2) // CELL_SIZE
    is_first = np.diff(centers, prepend=-1) > 0
    rows, cols = (part.flatten() for part in np.meshgrid(centers, centers, indexing="ij"))
    colors = list(COLORS)
    looks = [
        (1 + GLYPHS.index(cell.glyph), 1 + colors.index(cell.color)) if cell else (0, 0)
        for cell in grid.cells
    ]
    looks = np.array(looks)[rows * GRID + cols]
    first = np.outer(is_first, is_first).flatten()
    return torch.from_numpy(np.column_stack([looks, rows, cols, first]))


def tower_batches(
    processor: Qwen2VLProcessor, batch_size: int, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the vision tower's inputs, and labels (grid, token, 5)."""
    patches, grids = Patches(processor), TASK.split_pictures("train", seed=seed)
    while True:
        batch = [next(grids) for _ in range(batch_size)]
        yield patches(batch), torch.stack([token_labels(grid) for grid in batch])


class Packer(RowPacker):
    """Packs turns after one image's visual tokens in the form of Qwen2-VL's chat template."""

    def __init__(self, processor: Qwen2VLProcessor) -> None:
        """Take the tokenizer from the processor."""
        tokenizer = processor.tokenizer
        start, user, assistant, end, image, opening, closing = tokenizer.convert_tokens_to_ids(
            [START, "user", "assistant", END, IMAGE, IMAGE_START, IMAGE_END]
        )
        before = (start, user, opening)
        self.prefix_positions = _positions(len(before))
        form = ChatForm(
            prefix=(*before, *[image] * GRID_TOKENS**2, closing),
            next_position=int(self.prefix_positions.max()) + 1,
            turn=(start, user),
            reply=(end, start, assistant),
            end=end,
            row_length=_ROW_LENGTH,
        )
        super().__init__(tokenizer, form)

    def batch(self, batch: Sequence[tuple[Turn, ...]]) -> dict[str, Tensor]:
        """Return `RowPacker.batch` with M-RoPE's position_ids (3, row, token)."""
        packed = super().batch(batch)
        positions = packed["position_ids"].expand(3, -1, -1).clone()
        positions[..., : len(self.form.prefix)] = self.prefix_positions[:, None]
        return packed | {"position_ids": positions}


def _positions(num_before: int) -> Tensor:
    """Return time, row and column of the prefix's tokens: (3, token) int64."""
    before = torch.arange(num_before).expand(3, -1)
    side = torch.arange(GRID_TOKENS)
    rows, cols = (part.flatten() for part in torch.meshgrid(side, side, indexing="ij"))
    visual = num_before + torch.stack([torch.zeros_like(rows), rows, cols])
    closing = torch.full((3, 1), num_before + GRID_TOKENS)
    return torch.cat([before, visual, closing], dim=1)


def decoder_batches(
    processor: Qwen2VLProcessor, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield model inputs with labels on the answers only."""
    patches, packer = Patches(processor), Packer(processor)
    talks = TASK.turns("train", seed=seed)
    while True:
        grids, asked = zip(*(next(talks) for _ in range(batch_size)), strict=True)
        yield {**patches(grids), **packer.batch(asked)}
