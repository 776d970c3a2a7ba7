"""LLaVA-1.5: CLIP tower, MLP projector, a Llama-like decoder; one square grid per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from yopo.families.family import (
    Backbone,
    Family,
    ImageInfo,
    Run,
    count_tokens,
    equal_grids,
)
from yopo.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def grids_of(
    config: PreTrainedConfig, rows: Sequence[Sequence[Run]], images: ImageInfo
) -> list[tuple[Grid, ...]]:
    """Square grids from the tower's image and patch size (two images may form one token run)."""
    vision, counts = config.vision_config, count_tokens(rows)
    side = vision.image_size // vision.patch_size
    if config.vision_feature_select_strategy == "full":  # with a class token: one row of tokens
        return equal_grids(counts, Grid(1, side * side + 1))
    return equal_grids(counts, Grid(side, side))


LLAVA = Family(
    name="llava",
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    backbones=(Backbone(("llama", "mistral", "qwen2")),),
    aliases={
        "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
        "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
        "llava-tiny": "package:demo/llava_tiny",
    },
    grids_of=grids_of,
)
