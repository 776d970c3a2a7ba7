"""LLaVA-1.5: a vision tower, an MLP projector, a Llama-like decoder; one grid per image.

With CLIP and SigLIP every image is a square of one size. With Pixtral images keep their
proportions, and every row of their tokens but the last ends with a break token, which is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from yopo.models.family import (
    Backbone,
    Family,
    ImageInfo,
    Noise,
    Run,
    count_tokens,
    deal_images,
    equal_grids,
    image_sizes,
    sized_noise,
    square_noise,
)
from yopo.models.towers import (
    check_tower,
    class_attention,
    class_tokens,
    ends_rows,
    patch_grid,
    patch_sides,
    processor_settings,
    square,
    tower_of,
)
from yopo.plans.grid import Grid

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def grids_of(
    config: PreTrainedConfig, rows: Sequence[Sequence[Run]], images: ImageInfo
) -> list[tuple[Grid, ...]]:
    """One grid per image, preceded by a single-token grid if there is a class token."""
    check_tower(config)
    if not tower_of(config).keeps_sizes:
        return equal_grids(count_tokens(rows), *square_grids_of(config))
    sizes = image_sizes(images, "LLaVA with a Pixtral tower")
    return deal_images(rows, [(patch_grid(config, *size),) for size in sizes])


def square_grids_of(config: PreTrainedConfig) -> tuple[Grid, ...]:
    """The grids of one image if all have the same size (two images may form one token run)."""
    return (Grid(1, 1),) * class_tokens(config) + (square(config),)


def noise(config: PreTrainedConfig, grid: Grid, generator: torch.Generator) -> Noise:
    """An image of noise, with this grid if images keep their sizes, otherwise the tower's."""
    if not tower_of(config).keeps_sizes:
        _, inputs = square_noise(config, grid, generator)
        return sum(each.tokens for each in square_grids_of(config)), inputs
    return sized_noise(config, grid, patch_sides(config), generator)


LLAVA = Family(
    name="llava",
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    backbones=(Backbone(("llama", "mistral", "qwen2")),),
    aliases={
        "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
        "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
        "pixtral-12b": "mistral-community/pixtral-12b",
        "llava-tiny": "package:demo/llava_tiny",
    },
    grids_of=grids_of,
    noise=noise,
    check_vision=check_tower,
    ends_rows=ends_rows,
    processor_settings=processor_settings,
    class_attention=class_attention,
)
