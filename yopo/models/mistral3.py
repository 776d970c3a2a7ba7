"""Mistral 3 (Mistral Small 3.1): a Pixtral tower whose patches are merged; images of any size.

Every row of an image's tokens but the last ends with a break token, which is text, as in LLaVA with
a Pixtral tower.
"""

from __future__ import annotations

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
    sized_noise,
)
from yopo.models.public_pairs import DOCUMENTS
from yopo.models.towers import patch_sides
from yopo.plans.grid import Grid
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def grids_of(
    config: PreTrainedConfig, rows: Sequence[Sequence[Run]], images: ImageInfo
) -> list[tuple[Grid, ...]]:
    """One grid per image, in squares of merged patches."""
    sizes = image_sizes(images, "Mistral 3")
    high, wide = _merged_sides(config)
    return deal_images(rows, [(Grid(height // high, width // wide),) for height, width in sizes])


def _merged_sides(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of a square of merged patches in pixels."""
    high, wide = patch_sides(config)
    return high * config.spatial_merge_size, wide * config.spatial_merge_size


def check_vision(config: PreTrainedConfig) -> None:
    """Refuse towers that do not keep the sizes of images.

    Raises:
        ModelError: The tower is not Pixtral.
    """
    found = config.vision_config.model_type
    if found != "pixtral":
        raise ModelError(
            f"Mistral 3 with the vision tower '{found}' is not supported: the layout of its tokens "
            "in the image is unknown (supported: pixtral)."
        )


def processor_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings with which a processor writes as many placeholders as there are features."""
    return {
        "patch_size": patch_sides(config)[0],
        "spatial_merge_size": config.spatial_merge_size,
    }


def noise(config: PreTrainedConfig, grid: Grid, generator: torch.Generator) -> Noise:
    """An image of noise with this grid."""
    return sized_noise(config, grid, _merged_sides(config), generator)


MISTRAL3 = Family(
    name="mistral3",
    model_type="mistral3",
    architecture="Mistral3ForConditionalGeneration",
    backbones=(Backbone(("mistral",)),),
    aliases={
        "mistral-small-3.1-24b": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    },
    grids_of=grids_of,
    noise=noise,
    check_vision=check_vision,
    ends_rows=lambda config: True,
    processor_settings=processor_settings,
    public_pairs=DOCUMENTS,
)
