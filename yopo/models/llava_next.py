"""LLaVA-NeXT (1.6): a CLIP tower over one scaled-down image and the tiles of the large one.

An image is two consecutive grids. The base grid is the whole image in one tile. After it, the tiles
are laid out as one large picture, the padding is cut away, and every row ends with a newline token,
which is a visual token like the others: rows x (columns + 1).
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
    deal_images,
    image_sizes,
)
from yopo.models.public_pairs import DOCUMENTS
from yopo.models.towers import check_tower, class_tokens, processor_settings, square, tower_of
from yopo.plans.grid import Grid
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def grids_of(
    config: PreTrainedConfig, rows: Sequence[Sequence[Run]], images: ImageInfo
) -> list[tuple[Grid, ...]]:
    """Two grids per image, from the processor's image sizes."""
    sizes = image_sizes(images, "LLaVA-NeXT")
    return deal_images(rows, [image_grids(config, size) for size in sizes])


def image_grids(config: PreTrainedConfig, size: list[int]) -> tuple[Grid, Grid]:
    """The base grid and the grid of the tiles of an image of (height, width) pixels.

    Uses the transformers functions with which the model itself packs its features.
    """
    import torch
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
        unpad_image,
    )

    tile, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    base = square(config)
    side = base.rows
    if image_size_to_num_patches(size, pinpoints, tile) == 1:  # only the base, and a newline
        return base, Grid(1, 1)
    tile_rows, tile_cols = get_anyres_image_grid_shape(size, pinpoints, tile)
    canvas = torch.empty(0, tile_rows * side, tile_cols * side)
    _, height, width = unpad_image(canvas, size).shape
    return base, Grid(height, width + 1)


def check_vision(config: PreTrainedConfig) -> None:
    """Refuse towers whose tokens cannot be laid out as tiles; raises like :func:`check_tiles`."""
    check_tiles(config, "LLaVA-NeXT")


def check_tiles(config: PreTrainedConfig, name: str) -> None:
    """Refuse towers whose tokens cannot be laid out as tiles.

    Args:
        config: The model's outer configuration.
        name: The family's name in messages.

    Raises:
        ModelError: The tower is unknown, keeps the sizes of images, or a class token is kept.
    """
    check_tower(config)
    found = config.vision_config.model_type
    if tower_of(config).keeps_sizes:
        raise ModelError(f"{name} needs tiles of one size, but {found} keeps image sizes.")
    if class_tokens(config):
        raise ModelError(
            f"{name} lays out the patches of its tiles as one picture, but with "
            f"vision_feature_select_strategy 'full' every tile of {found} also has a class token.",
            remedy="Set it to 'default' in config.json if the model was trained that way.",
        )


def noise(config: PreTrainedConfig, grid: Grid, generator: torch.Generator) -> Noise:
    """An image of noise in the first size that needs no padding."""
    count = sum(each.tokens for each in image_grids(config, config.image_grid_pinpoints[0]))
    return count, noise_in_tiles(config, generator)


def noise_in_tiles(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The model's inputs for an image of noise in the first size that needs no padding."""
    import torch

    tile, (height, width) = config.vision_config.image_size, config.image_grid_pinpoints[0]
    num_tiles = 1 + height // tile * (width // tile)
    pixels = torch.randn(1, num_tiles, 3, tile, tile, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


LLAVA_NEXT = Family(
    name="llava_next",
    model_type="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    backbones=(Backbone(("llama", "mistral", "qwen2")),),
    aliases={
        "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-next-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-next-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    },
    grids_of=grids_of,
    noise=noise,
    check_vision=check_vision,
    ends_rows=lambda config: True,
    processor_settings=processor_settings,
    public_pairs=DOCUMENTS,
)
