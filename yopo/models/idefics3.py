"""Idefics3 and SmolVLM: square crops of an image, then the whole image as one more.

Tags of text stand between the crops and say where each lies. Every crop counts as an image: visual
tokens have no neighbors outside their crop. SmolVLM's frames of a video are written as images, and
count as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from yopo.models.family import (
    Backbone,
    Family,
    ImageInfo,
    Noise,
    Run,
    count_tokens,
    equal_grids,
    square_noise,
)
from yopo.models.public_pairs import DOCUMENTS
from yopo.plans.grid import Grid

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def crop(config: PreTrainedConfig) -> Grid:
    """The grid of a crop: the tower's patches, reduced by the pixel shuffle."""
    vision = config.vision_config
    side = int(vision.image_size // vision.patch_size // config.scale_factor)
    return Grid(side, side)


def grids_of(
    config: PreTrainedConfig, rows: Sequence[Sequence[Run]], images: ImageInfo
) -> list[tuple[Grid, ...]]:
    """One square grid per crop."""
    return equal_grids(count_tokens(rows), crop(config))


def noise(config: PreTrainedConfig, grid: Grid, generator: torch.Generator) -> Noise:
    """One crop of noise."""
    _, inputs = square_noise(config, grid, generator)
    return crop(config).tokens, {"pixel_values": inputs["pixel_values"][:, None]}


def processor_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The setting with which a processor writes as many placeholders as there are features."""
    return {"image_seq_len": crop(config).tokens}


def _family(name: str, architecture: str, aliases: Mapping[str, str]) -> Family:
    return Family(
        name=name,
        model_type=name,
        architecture=architecture,
        backbones=(Backbone(("llama",)),),
        aliases=aliases,
        grids_of=grids_of,
        noise=noise,
        processor_settings=processor_settings,
        public_pairs=DOCUMENTS,
    )


IDEFICS3 = _family(
    "idefics3",
    "Idefics3ForConditionalGeneration",
    {
        "idefics3-8b": "HuggingFaceM4/Idefics3-8B-Llama3",
        "smolvlm-2.2b": "HuggingFaceTB/SmolVLM-Instruct",
    },
)
SMOLVLM = _family(
    "smolvlm",
    "SmolVLMForConditionalGeneration",
    {
        "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    },
)
