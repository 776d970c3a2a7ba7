"""Idefics3 and SmolVLM: crops with tags of text between them, the whole image last."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import LlamaConfig, PreTrainedModel
from zoo import IMAGE, TEXT, Entry, Picture

from yopo.plans.grid import Grid

AROUND, WHOLE, NEWLINE = 96, 95, 94
TAGS = 60
"""The first of the tokens that say where a crop lies."""

CROP, PATCH, SCALE = 32, 4, 2
SIDE = CROP // PATCH // SCALE


def picture(rows: int, cols: int) -> Picture:
    """Make an image that was cut into rows x columns of crops, or none if these are 0."""
    tokens: list[int] = []
    for row in range(rows):
        for col in range(cols):
            tokens += [AROUND, TAGS + row * cols + col, *(IMAGE,) * SIDE**2]
        tokens.append(NEWLINE)
    tokens += [AROUND, WHOLE, *(IMAGE,) * SIDE**2, AROUND]
    crops = rows * cols + 1
    return Picture(tuple(tokens), (Grid(SIDE, SIDE),) * crops, crops)


class Idefics3(Entry):
    pictures = {"A": picture(0, 0), "B": picture(1, 2), "C": picture(2, 1), "L": picture(3, 3)}

    def __init__(self, name: str, prefix: str):
        self.name, self.prefix = name, prefix

    def build(self) -> PreTrainedModel:
        config = getattr(transformers, f"{self.prefix}Config")(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": CROP,
                "patch_size": PATCH,
            },
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=SCALE,
            tie_word_embeddings=False,
        )
        return getattr(transformers, f"{self.prefix}ForConditionalGeneration")(config)

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        """All crops of the batch in one row, as no prompt needs padding crops then."""
        crops = sum(each.size for each in pictures)
        return {"pixel_values": torch.randn(crops, 1, 3, CROP, CROP, generator=generator)}


ENTRIES = [Idefics3("idefics3", "Idefics3"), Idefics3("smolvlm", "SmolVLM")]
