"""Vision towers of LLaVA and LLaVA-NeXT: the tokens they output, and settings for processors.

A tower outputs its patches row by row, some after a class token; the model cuts off the first token
(``vision_feature_select_strategy: default``) or keeps it (``full``). The processor writes as many
placeholders, by the same settings, which it reads from its own files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yopo.plans.grid import Grid
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Tower:
    """The output of a vision tower for an image.

    Attributes:
        class_tokens: Tokens before the patches.
        keeps_sizes: Whether images keep their proportions, so that grids differ per image;
            otherwise all are squares of one size.
    """

    class_tokens: int = 0
    keeps_sizes: bool = False


TOWERS = {
    "clip_vision_model": Tower(class_tokens=1),
    "siglip_vision_model": Tower(),
    "pixtral": Tower(keeps_sizes=True),
}
"""``model_type`` of vision configurations -> tower."""


def tower_of(config: PreTrainedConfig) -> Tower:
    """The tower of a model's outer configuration.

    Raises:
        ModelError: It is unknown, and so is the layout of its tokens in the image.
    """
    found = config.vision_config.model_type
    if found not in TOWERS:
        raise ModelError(
            f"{config.model_type} with the vision tower '{found}' is not supported: the layout of "
            f"its tokens in the image is unknown (supported: {', '.join(TOWERS)})."
        )
    return TOWERS[found]


def ends_rows(config: PreTrainedConfig) -> bool:
    """Whether the prompt marks the end of an image's rows, as it must if images keep sizes."""
    return TOWERS.get(config.vision_config.model_type, Tower()).keeps_sizes


def check_tower(config: PreTrainedConfig) -> None:
    """Refuse a model whose visual tokens are not a whole image.

    Raises:
        ModelError: The tower is unknown, or has no class token and would lose its first patch.
    """
    tower = tower_of(config)
    if config.vision_feature_select_strategy == "default" and not tower.class_tokens:
        raise ModelError(
            f"The vision tower '{config.vision_config.model_type}' has no class token, but "
            "vision_feature_select_strategy is 'default', which cuts off the first token of every "
            "image: here that is a patch.",
            remedy="If the model was trained with all patches, set it to 'full' in config.json.",
        )


def class_tokens(config: PreTrainedConfig) -> int:
    """Tokens that are kept before an image's patches."""
    is_cut = config.vision_feature_select_strategy == "default"
    return max(tower_of(config).class_tokens - is_cut, 0)


def class_attention(config: PreTrainedConfig) -> str | None:
    """The attention module of the layer whose output the projector gets, of several the last.

    None without a class token, and where it is itself among the visual tokens.
    """
    if not tower_of(config).class_tokens or class_tokens(config):
        return None
    chosen = config.vision_feature_layer
    state = chosen if isinstance(chosen, int) else chosen[-1]
    layer = state - 1 if state >= 0 else config.vision_config.num_hidden_layers + state
    return f"vision_tower.encoder.layers.{layer}.self_attn" if layer >= 0 else None


def patch_sides(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    return _both(config.vision_config.patch_size)


def patch_grid(config: PreTrainedConfig, height: int, width: int) -> Grid:
    """The whole patches of an image of this size in pixels."""
    high, wide = patch_sides(config)
    return Grid(height // high, width // wide)


def square(config: PreTrainedConfig) -> Grid:
    """The patches of an image of the tower's fixed size."""
    return patch_grid(config, *_both(config.vision_config.image_size))


def processor_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings with which a processor writes as many placeholders as there are features."""
    return {
        "patch_size": patch_sides(config)[0],
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": tower_of(config).class_tokens,
    }


def _both(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width
