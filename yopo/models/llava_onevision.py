"""LLaVA-OneVision: a SigLIP tower over an image and its tiles, scaled down if they are many.

An image that is alone in its prompt is laid out as in LLaVA-NeXT: a base grid, then the tiles as
one picture whose rows end with newline tokens. A picture of too many tokens is first scaled down.
Images that share a prompt, by the processor's ``batch_num_images``, have only the base grid and one
newline. Frames of videos count as text and are never pruned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from yopo.models.family import (
    Backbone,
    Family,
    ImageInfo,
    Noise,
    Run,
    deal_images,
    image_sizes,
)
from yopo.models.llava_next import check_tiles, noise_in_tiles
from yopo.models.public_pairs import DOCUMENTS
from yopo.models.towers import square
from yopo.plans.grid import Grid
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_SHRUNK = 1.1
"""Side of a picture over that of the most tiles from which on the model scales it down."""

_ANYRES = "anyres_max_"


def grids_of(
    config: PreTrainedConfig, rows: Sequence[Sequence[Run]], images: ImageInfo
) -> list[tuple[Grid, ...]]:
    """Two grids per image, from the processor's image sizes and numbers of images."""
    sizes = image_sizes(images, "LLaVA-OneVision")
    counts = images.get("batch_num_images")
    has_tiles = [True] * len(sizes)
    if counts is not None:
        has_tiles = [count == 1 for count in counts.tolist() for _ in range(count)]
    if len(has_tiles) != len(sizes):
        raise ModelError(
            f"The prompts have {len(sizes)} images, but batch_num_images tells of "
            f"{len(has_tiles)}.",
            remedy="Pass everything that the processor returns for the same prompts.",
        )
    grids = [image_grids(config, *each) for each in zip(sizes, has_tiles, strict=True)]
    return deal_images(rows, grids)


def image_grids(config: PreTrainedConfig, size: list[int], has_tiles: bool) -> tuple[Grid, Grid]:
    """The base grid and the grid of the tiles of an image of (height, width) pixels.

    Uses the transformers functions with which the model itself packs its features.
    """
    import torch
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
        unpad_image,
    )

    tile, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    base = square(config)
    side = base.rows
    if not has_tiles or image_size_to_num_patches(size, pinpoints, tile) == 1:
        return base, Grid(1, 1)  # a newline
    tile_rows, tile_cols = get_anyres_image_grid_shape(size, pinpoints, tile)
    canvas = torch.empty(0, tile_rows * side, tile_cols * side)
    _, height, width = unpad_image(canvas, size).shape
    ratio = math.sqrt(height * width / (_most_tiles(config) * side**2))
    if ratio > _SHRUNK:
        height, width = int(height // ratio), int(width // ratio)
    return base, Grid(height, width + 1)


def _most_tiles(config: PreTrainedConfig) -> int:
    return int(config.vision_aspect_ratio.removeprefix(_ANYRES))


def check_vision(config: PreTrainedConfig) -> None:
    """Refuse towers whose tokens cannot be laid out as tiles.

    Raises:
        ModelError: As for LLaVA-NeXT, or the largest number of tiles is unknown.
    """
    check_tiles(config, "LLaVA-OneVision")
    found = config.vision_aspect_ratio
    if not found.removeprefix(_ANYRES).isdigit():
        raise ModelError(
            f"LLaVA-OneVision with vision_aspect_ratio '{found}' is not supported: how many tokens "
            "an image has is unknown.",
            remedy=f"Set it to '{_ANYRES}9' (or another number of tiles) in config.json, if the "
            "model was trained that way.",
        )


def processor_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings with which a processor writes as many placeholders as there are features."""
    return {
        "num_image_tokens": square(config).tokens,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }


def noise(config: PreTrainedConfig, grid: Grid, generator: torch.Generator) -> Noise:
    """An image of noise in the first size that needs no padding."""
    sides = config.image_grid_pinpoints[0]
    count = sum(each.tokens for each in image_grids(config, sides, has_tiles=True))
    return count, noise_in_tiles(config, generator)


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    model_type="llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    backbones=(Backbone(("qwen2", "llama", "mistral")),),
    aliases={
        "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-onevision-72b": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
    },
    grids_of=grids_of,
    noise=noise,
    check_vision=check_vision,
    ends_rows=lambda config: True,
    processor_settings=processor_settings,
    public_pairs=DOCUMENTS,
)
