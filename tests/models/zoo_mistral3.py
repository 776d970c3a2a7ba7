"""Mistral 3: images of any size, patches merged, rows that end with break tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from zoo import IMAGE, TEXT, Entry, Picture

from yopo.plans.grid import Grid

BREAK, END = 96, 95
PATCH, MERGE = 4, 2


def picture(rows: int, cols: int) -> Picture:
    """Make an image of this many tokens; rows end with a break token, the last with another."""
    tokens = ((IMAGE,) * cols + (BREAK,)) * rows
    size = (rows * PATCH * MERGE, cols * PATCH * MERGE)
    return Picture((*tokens[:-1], END), (Grid(rows, cols),), size)


class Mistral3(Entry):
    name = "mistral3"
    pictures = {"A": picture(3, 5), "B": picture(4, 2), "C": picture(2, 5), "L": picture(12, 10)}

    def build(self) -> Mistral3ForConditionalGeneration:
        vision = PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16 * PATCH * MERGE,
            patch_size=PATCH,
        )
        config = Mistral3Config(
            vision_config=vision,
            text_config=MistralConfig(**TEXT, head_dim=16),
            image_token_id=IMAGE,
            spatial_merge_size=MERGE,
            tie_word_embeddings=False,
        )
        return Mistral3ForConditionalGeneration(config)

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        sizes = [each.size for each in pictures]
        high, wide = (max(lengths) for lengths in zip(*sizes, strict=True))
        pixels = torch.zeros(len(sizes), 3, high, wide)  # padded, as the processor pads a batch
        for image, (rows, cols) in zip(pixels, sizes, strict=True):
            image[:, :rows, :cols] = torch.randn(3, rows, cols, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


ENTRIES = [Mistral3()]
