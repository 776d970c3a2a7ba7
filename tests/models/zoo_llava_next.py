"""LLaVA-NeXT: per image a base tile and an unpadded grid of tiles whose rows end with newlines."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from zoo import IMAGE, TEXT, Entry, Picture

from yopo.plans.grid import Grid

TILE, PATCH = 16, 4
SIDE = TILE // PATCH
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [64, 48]]
BACKBONES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def picture(size: tuple[int, int], rows: int, cols: int) -> Picture:
    """Make an image of (height, width) pixels with this many rows and columns of tile tokens."""
    grids = (Grid(SIDE, SIDE), Grid(rows, cols + 1))
    return Picture((IMAGE,) * sum(grid.tokens for grid in grids), grids, size)


class LlavaNext(Entry):
    pictures = {
        "A": picture((16, 32), 4, 8),  # fills two tiles
        "B": picture((30, 12), 8, 4),  # upright; padded to 32 x 16, then unpadded
        "C": picture((20, 100), 2, 12),  # wide; padded above and below
        "L": picture((62, 50), 14, 12),  # twelve tiles
    }
    prompts = {"unpadded": [[1, 5, "C", 6, "L", 7], [1, "B", 4]]}

    def __init__(self, backbone: str):
        self.name, self.backbone = f"llava-next-{backbone}", backbone

    def build(self) -> LlavaNextForConditionalGeneration:
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=PATCH,
        )
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=BACKBONES[self.backbone](**TEXT),
            image_token_id=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )
        return LlavaNextForConditionalGeneration(config)

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        sizes = [each.size for each in pictures]
        tiles = max(image_size_to_num_patches(size, PINPOINTS, TILE) for size in sizes)
        pixels = torch.randn(len(sizes), tiles, 3, TILE, TILE, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


ENTRIES = [LlavaNext(backbone) for backbone in BACKBONES]
