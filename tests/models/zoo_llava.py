"""LLaVA: squares of one size under CLIP and SigLIP, images of any size under Pixtral."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)
from zoo import IMAGE, Entry, Picture

from yopo.plans.grid import Grid

SQUARE = Picture((IMAGE,) * tiny.SIDE**2, (Grid(tiny.SIDE, tiny.SIDE),), None)
CLASS = Picture((IMAGE,) * (tiny.SIDE**2 + 1), (Grid(1, 1), *SQUARE.grids), None)
BREAK, END = 96, 95
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": tiny.SIDE * tiny.PATCH,
    "patch_size": tiny.PATCH,
}


class Llava(Entry):
    pictures = {"A": SQUARE, "B": SQUARE, "L": SQUARE}
    selection: dict[str, Any] = {}

    def __init__(self, backbone: str, tower: str = ""):
        self.name, self.backbone = f"llava-{tower}{backbone}", backbone

    def vision(self) -> PreTrainedConfig:
        return CLIPVisionConfig(**VISION)

    def build(self) -> LlavaForConditionalGeneration:
        text = tiny.text_config(self.backbone)
        config = LlavaConfig(
            vision_config=self.vision(),
            text_config=text,
            image_token_id=IMAGE,
            **self.selection,
        )
        return LlavaForConditionalGeneration(config)

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        side = tiny.SIDE * tiny.PATCH
        return {"pixel_values": torch.randn(len(pictures), 3, side, side, generator=generator)}


class WithClassToken(Llava):
    """CLIP that keeps its class token, which is not a patch."""

    pictures = {"A": CLASS, "B": CLASS, "L": CLASS}
    selection = {"vision_feature_select_strategy": "full"}


class Siglip(Llava):
    """A tower that has no class token."""

    selection = {"vision_feature_select_strategy": "full"}

    def vision(self) -> PreTrainedConfig:
        # Rows of pixels are left over, as in the published towers of 384 pixels.
        return SiglipVisionConfig(**(VISION | {"image_size": tiny.SIDE * tiny.PATCH + 3}))

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        side = tiny.SIDE * tiny.PATCH + 3
        return {"pixel_values": torch.randn(len(pictures), 3, side, side, generator=generator)}


def sized(rows: int, cols: int) -> Picture:
    """Make an image of this many patches; rows end with a break token, the last with another."""
    tokens = ((IMAGE,) * cols + (BREAK,)) * rows
    size = (rows * tiny.PATCH, cols * tiny.PATCH)
    return Picture((*tokens[:-1], END), (Grid(rows, cols),), size)


class Pixtral(Llava):
    """Images keep their proportions."""

    pictures = {"A": sized(3, 5), "B": sized(4, 2), "L": sized(6, 9)}
    selection = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}

    def vision(self) -> PreTrainedConfig:
        return PixtralVisionConfig(**(VISION | {"image_size": 16 * tiny.PATCH}))

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        sizes = [each.size for each in pictures]
        high, wide = (max(lengths) for lengths in zip(*sizes, strict=True))
        pixels = torch.zeros(len(sizes), 3, high, wide)  # padded, as the processor pads a batch
        for image, (rows, cols) in zip(pixels, sizes, strict=True):
            image[:, :rows, :cols] = torch.randn(3, rows, cols, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


ENTRIES = [
    Llava("mha"),
    Llava("qwen2"),
    WithClassToken("mha", "class-token-"),
    Siglip("mha", "siglip-"),
    Pixtral("qwen2", "pixtral-"),
]
