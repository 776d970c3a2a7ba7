"""The record that describes a family, and a decoder's shape from its configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from yopo.models.public_pairs import PHOTOS, PublicPairs
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

Run = tuple[int, int]
"""Consecutive visual tokens with one id in a prompt: (token id, count)."""

ImageInfo = Mapping[str, "torch.Tensor"]
"""The processor's outputs about a batch's images other than their pixels, by its names:
``image_sizes``, ``image_grid_thw``, ``batch_num_images``, ... Empty where a model takes none."""

GridsOf = Callable[["PreTrainedConfig", Sequence[Sequence[Run]], ImageInfo], list[tuple[Grid, ...]]]
"""(configuration, visual runs per batch row, image info) -> the image grids of every batch row."""

Noise = tuple[int, dict[str, "torch.Tensor"]]
"""An image of noise: its number of visual tokens, and the processor outputs for it."""

NoiseOf = Callable[["PreTrainedConfig", Grid, "torch.Generator"], Noise]
"""(configuration, grid, generator) -> noise, with that grid if images keep their sizes."""

Rotate = Callable[
    ["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"],
    tuple["torch.Tensor", "torch.Tensor"],
]
"""(queries, keys, cosines, sines) -> rotated queries and keys, (batch, heads, length, head_dim);
cosines and sines are (batch, length, head_dim)."""

DECODER_KEY = re.compile(
    r"^(?:model\.)?(?:(?:language_model|text_model)\.)?(?:model\.)?layers\.(\d+)\.(.+)$"
)
"""A decoder layer's tensor name in a checkpoint, in hub layout and in module-name layout alike;
groups: layer index, name inside the layer. Vision towers never match."""


@dataclass(frozen=True)
class Backbone:
    """Names of the parts of a pre-norm decoder layer.

    A projection named twice is a fused one that holds its parts in this order: query, key, value;
    gate, up.

    Attributes:
        model_types: ``model_type`` of the text configurations with this backbone.
        query, key, value, output: Attention projections under ``self_attn``.
        gate, up, down: FFN projections under ``mlp``.
        attention_norm, ffn_norm: Norms before attention and FFN.
        activation: The FFN's activation function under ``mlp``.
        residual_dropouts: Dropouts after attention and FFN; None if the backbone has none.
        position_axes: Position numbers per token: 1, or 3 (time, height, width) under M-RoPE.
        rotary: Path in transformers of the function that rotates queries and keys.
        head_norms: Norms of queries and keys per head under ``self_attn``, before the rotation;
            None if the backbone has none.
        deepstack: The decoder's argument with vision features to add after its first layers
            (DeepStack); None if it takes none.
    """

    model_types: tuple[str, ...]
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    activation: str = "act_fn"
    residual_dropouts: tuple[str, str] | None = None
    position_axes: int = 1
    rotary: str = "transformers.models.llama.modeling_llama:apply_rotary_pos_emb"
    head_norms: tuple[str, str] | None = None
    deepstack: str | None = None

    @property
    def has_fused_attention(self) -> bool:
        """Whether query, key and value are one projection."""
        return self.query == self.key

    @property
    def has_fused_ffn(self) -> bool:
        """Whether gate and up are one projection."""
        return self.gate == self.up

    @property
    def rotate(self) -> Rotate:
        """The function that rotates queries and keys."""
        rotate: Rotate = resolve_name(self.rotary)
        return rotate

    def added_features(self, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """Vision features among a decoder's arguments, one per layer, starting with the first.

        Returns:
            (visual tokens of all rows, hidden) each, to add to that layer's output.
        """
        return tuple(arguments.get(self.deepstack) or ()) if self.deepstack else ()


def image_token(config: PreTrainedConfig) -> tuple[int, ...]:
    """The one placeholder id of families without video."""
    return (config.image_token_id,)


def square_noise(config: PreTrainedConfig, grid: Grid, generator: torch.Generator) -> Noise:
    """Noise for towers with a fixed size for every image (or tile)."""
    import torch

    vision = config.vision_config
    size = vision.image_size
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    shape = (1, getattr(vision, "num_channels", 3), high, wide)
    return grid.tokens, {"pixel_values": torch.randn(shape, generator=generator)}


def sized_noise(
    config: PreTrainedConfig, grid: Grid, sides: tuple[int, int], generator: torch.Generator
) -> Noise:
    """Noise for towers that keep the sizes of images, for tokens of (height, width) pixels."""
    import torch

    size = (grid.rows * sides[0], grid.cols * sides[1])
    pixels = torch.randn(1, config.vision_config.num_channels, *size, generator=generator)
    return grid.tokens, {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def accept(config: PreTrainedConfig) -> None:
    """Refuse nothing."""


def never(config: PreTrainedConfig) -> bool:
    """The rows of an image follow one another."""
    return False


def no_class_attention(config: PreTrainedConfig) -> str | None:
    """The attention of the tower's class token is not recorded, or it has none."""
    return None


def no_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """For processors that need no settings from the model."""
    return {}


@dataclass(frozen=True)
class Family:
    """One multimodal model family.

    Attributes:
        name: Name in plans.
        model_type: ``model_type`` of the outer configuration.
        architecture: The transformers class of its checkpoints.
        backbones: Text decoders that it may use.
        aliases: Short names for hub ids; a value ``package:PATH`` is inside this package.
        grids_of: Locates the images among a batch row's visual tokens.
        token_ids: Ids of the placeholder tokens of images and, second, of video frames.
        noise: Makes an image of noise, to try a checkpoint without a processor.
        originals: ``model_type`` of checkpoints that ``yopo convert`` converts to this family.
        check_vision: Raises a ``ModelError`` for a configuration whose visual tokens cannot be
            located.
        ends_rows: Whether each row of an image ends with a separator token.
        processor_settings: The model's values for the processor, by attribute name.
        class_attention: Path under the base model of the tower's attention module whose class
            token ranks patches (see ``models.tower_attention``); None: there is none.
        public_pairs: Pairs to try a model on, for those without their own.
        takes_videos: Whether pairs about videos can be used.
    """

    name: str
    model_type: str
    architecture: str
    backbones: tuple[Backbone, ...]
    aliases: Mapping[str, str]
    grids_of: GridsOf
    token_ids: Callable[[PreTrainedConfig], tuple[int, ...]] = image_token
    noise: NoiseOf = square_noise
    originals: tuple[str, ...] = ()
    check_vision: Callable[[PreTrainedConfig], None] = accept
    ends_rows: Callable[[PreTrainedConfig], bool] = never
    processor_settings: Callable[[PreTrainedConfig], dict[str, Any]] = no_settings
    class_attention: Callable[[PreTrainedConfig], str | None] = no_class_attention
    public_pairs: PublicPairs = PHOTOS
    takes_videos: bool = False

    def backbone(self, config: PreTrainedConfig) -> Backbone:
        """The backbone of a model of this family.

        Raises:
            ModelError: This family does not support the text decoder's ``model_type``.
        """
        found = config.get_text_config().model_type
        for backbone in self.backbones:
            if found in backbone.model_types:
                return backbone
        known = ", ".join(name for each in self.backbones for name in each.model_types)
        raise ModelError(
            f"{self.name} with the text decoder '{found}' is not supported (supported: {known})."
        )


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Read the text decoder's dimensions from an outer configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        ffn=text.intermediate_size,
    )


def count_tokens(rows: Sequence[Sequence[Run]]) -> list[int]:
    """Visual tokens per batch row."""
    return [sum(length for _, length in row) for row in rows]


def square_grids(counts: Sequence[int], tokens_per_image: int) -> list[tuple[Grid, ...]]:
    """Grids of rows of whole square images of one size; raises like :func:`equal_grids`."""
    side = math.isqrt(tokens_per_image)
    return equal_grids(counts, Grid(side, side))


def equal_grids(counts: Sequence[int], *image: Grid) -> list[tuple[Grid, ...]]:
    """Grids of rows that hold whole images of one size.

    Args:
        counts: Visual tokens per batch row.
        image: Every image's grid, or grids.

    Raises:
        ModelError: A count is not a multiple of the image's tokens: the prompt was cut inside an
            image (chunked prefill), or the processor and the model disagree.
    """
    rows, tokens = [], sum(grid.tokens for grid in image)
    for count in counts:
        images, rest = divmod(count, tokens)
        if rest:
            raise ModelError(
                f"{count} visual tokens are not a whole number of images of {tokens} tokens.",
                remedy="Prefill the prompt in one piece (no prefill_chunk_size), and check that "
                "the processor's patch_size and vision_feature_select_strategy match the model's.",
            )
        rows.append(image * images)
    return rows


def image_sizes(images: ImageInfo, name: str) -> list[list[int]]:
    """(height, width) in pixels of a batch's images, for families that lay out tokens by it.

    Args:
        images: The processor's outputs about them.
        name: The family, in messages.

    Raises:
        ModelError: The outputs do not tell.
    """
    if images.get("image_sizes") is None:
        raise ModelError(
            f"{name} needs the sizes of its images (image_sizes) to locate their tokens.",
            remedy="Pass everything that the processor returns to the model.",
        )
    sizes: list[list[int]] = images["image_sizes"].tolist()
    return sizes


def deal_images(
    rows: Sequence[Sequence[Run]], images: Sequence[tuple[Grid, ...]]
) -> list[tuple[Grid, ...]]:
    """Assign a batch's images, in order, to the rows whose visual tokens they fill.

    Beam search repeats every row but passes its images once; repeated rows then share them.

    Args:
        rows: Visual runs per batch row.
        images: Grids of every image (which may have several), in prompt order.

    Raises:
        ModelError: The images' token counts do not match the rows'.
    """
    counts = count_tokens(rows)
    sizes = [sum(grid.tokens for grid in image) for image in images]
    repeats = sum(counts) // sum(sizes) if sum(sizes) else 1
    dealt: list[tuple[Grid, ...]] = []
    remaining = list(zip(sizes, images, strict=True))
    for count in counts[:: repeats or 1]:
        row: tuple[Grid, ...] = ()
        while count > 0 and remaining:
            size, image = remaining.pop(0)
            row, count = row + image, count - size
        dealt += [row] * max(repeats, 1)
        if count:
            break
    if remaining or [sum(grid.tokens for grid in row) for row in dealt] != counts:
        raise ModelError(
            f"The prompts' visual tokens ({counts} per row) do not match the images "
            f"({sizes} per image).",
            remedy="Prefill the prompt in one piece, with the processor that belongs to the model.",
        )
    return dealt
