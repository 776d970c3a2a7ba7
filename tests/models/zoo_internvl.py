"""InternVL: tiles with equal numbers of tokens on three decoders, Phi-3 with fused projections."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from zoo import IMAGE, TEXT, Entry, Picture

from yopo.plans.grid import Grid

START, END = 95, 96
TILE, PATCH = 24, 4
SIDE = TILE // PATCH // 2
"""Rows and columns of a tile's tokens, after the pixel shuffle."""

BACKBONES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "phi3": Phi3Config, "qwen3": Qwen3Config}


def picture(tiles: int) -> Picture:
    """Make an image that was cut into this many tiles, the thumbnail included."""
    tokens = (START, *(IMAGE,) * (tiles * SIDE**2), END)
    return Picture(tokens, (Grid(SIDE, SIDE),) * tiles, tiles)


class InternVL(Entry):
    pictures = {"A": picture(1), "B": picture(3), "L": picture(7)}

    def __init__(self, backbone: str, *, is_tied: bool = False):
        self.name, self.backbone, self.is_tied = f"internvl-{backbone}", backbone, is_tied

    def build(self) -> InternVLForConditionalGeneration:
        vision = InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=PATCH,
        )
        text = BACKBONES[self.backbone](**TEXT, head_dim=16, tie_word_embeddings=self.is_tied)
        config = InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=SIDE**2,
            tie_word_embeddings=self.is_tied,
        )
        return InternVLForConditionalGeneration(config)

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        tiles = sum(each.size for each in pictures)
        return {"pixel_values": torch.randn(tiles, 3, TILE, TILE, generator=generator)}


ENTRIES = [InternVL(name, is_tied=name == "qwen2") for name in BACKBONES]
