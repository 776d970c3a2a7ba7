"""LLaVA-1.5: every image is a square of one size."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from zoo import IMAGE, Entry, Picture

from yopo.grid import Grid

SQUARE = Picture((IMAGE,) * tiny.SIDE**2, (Grid(tiny.SIDE, tiny.SIDE),), None)


class Llava(Entry):
    pictures = {"A": SQUARE, "B": SQUARE, "L": SQUARE}

    def __init__(self, backbone: str):
        self.name, self.backbone = f"llava-{backbone}", backbone

    def build(self) -> LlavaForConditionalGeneration:
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=tiny.SIDE * tiny.PATCH,
            patch_size=tiny.PATCH,
        )
        text = tiny.text_config(self.backbone)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
        return LlavaForConditionalGeneration(config)

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        side = tiny.SIDE * tiny.PATCH
        return {"pixel_values": torch.randn(len(pictures), 3, side, side, generator=generator)}


ENTRIES = [Llava("mha"), Llava("qwen2")]
