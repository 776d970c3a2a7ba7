"""LLaVA-OneVision: tiles as in LLaVA-NeXT, scaled down where they are many."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from zoo import IMAGE, TEXT, VIDEO, Entry, Picture

from yopo.plans.grid import Grid

TILE, PATCH = 16, 4
SIDE = TILE // PATCH
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [64, 48]]
MOST_TILES = 4


def picture(size: tuple[int, int], rows: int, cols: int) -> Picture:
    """Make an image of (height, width) pixels with this many rows and columns of tile tokens."""
    grids = (Grid(SIDE, SIDE), Grid(rows, cols + 1))
    return Picture((IMAGE,) * sum(grid.tokens for grid in grids), grids, size)


def config() -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{MOST_TILES}",
    )


class LlavaOnevision(Entry):
    name = "llava-onevision"
    pictures = {
        "A": picture((16, 32), 4, 8),  # fills two tiles
        "B": picture((30, 12), 8, 4),  # upright; padded to 32 x 16, then unpadded
        "C": picture((20, 100), 2, 12),  # wide; padded above and below
        "L": picture((62, 50), 8, 7),  # twelve tiles, 14 x 12 unpadded, scaled down by 1.62
    }
    prompts = {"unpadded": [[1, 5, "C", 6, "L", 7], [1, "B", 4]]}

    def build(self) -> LlavaOnevisionForConditionalGeneration:
        return LlavaOnevisionForConditionalGeneration(config())

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        sizes = [each.size for each in pictures]
        tiles = max(image_size_to_num_patches(size, PINPOINTS, TILE) for size in sizes)
        pixels = torch.randn(len(sizes), tiles, 3, TILE, TILE, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


ENTRIES = [LlavaOnevision()]
