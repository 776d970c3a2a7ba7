"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any size, several of them, and videos.

Their decoders use three position numbers per token (time, row, column: M-RoPE); Qwen3-VL's also
norms queries and keys per head and adds vision features after its first layers (DeepStack).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from yopo.models.family import Backbone, Family, ImageInfo, Noise, Run, deal_images
from yopo.models.public_pairs import DOCUMENTS
from yopo.plans.grid import Grid
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_GRIDS = {"image_token_id": "image_grid_thw", "video_token_id": "video_grid_thw"}
"""Placeholder -> the processor's (images, 3) table of frames, rows and columns of patches."""


def token_ids(config: PreTrainedConfig) -> tuple[int, ...]:
    """Placeholders of images and of video frames."""
    return tuple(getattr(config, name) for name in _GRIDS)


def grids_of(
    config: PreTrainedConfig, rows: Sequence[Sequence[Run]], images: ImageInfo
) -> list[tuple[Grid, ...]]:
    """One grid per image and per video frame, in squares of merged patches.

    Frames may form one run (Qwen2-VL) or one run each, with timestamps in between (Qwen3-VL).
    """
    merge = config.vision_config.spatial_merge_size
    dealt: dict[int, list[tuple[Grid, ...]]] = {}
    for token, name in zip(token_ids(config), _GRIDS.values(), strict=True):
        of_kind = [[run for run in row if run[0] == token] for row in rows]
        if not any(of_kind):
            continue
        if images.get(name) is None:
            raise ModelError(
                f"The prompt has visual tokens, but the {name} of their images is missing.",
                remedy="Pass everything that the processor returns; if you encode images yourself, "
                "do it while the model is pruned.",
            )
        sizes = images[name].tolist()
        grids = [(Grid(high // merge, wide // merge),) * frames for frames, high, wide in sizes]
        dealt[token] = deal_images(of_kind, grids)
    return [
        tuple(_in_prompt_order(row, {token: iter(dealt[token][number]) for token in dealt}))
        for number, row in enumerate(rows)
    ]


def _in_prompt_order(row: Sequence[Run], grids: Mapping[int, Iterator[Grid]]) -> Iterator[Grid]:
    """Images and frames of one batch row, in the order of its runs."""
    for token, length in row:
        while length > 0:
            grid = next(grids[token], None)
            if grid is None or grid.tokens > length:
                raise ModelError(
                    "A run of visual tokens is not a whole number of images.",
                    remedy="Prefill the prompt in one piece, as the processor wrote it.",
                )
            length -= grid.tokens
            yield grid


def noise(config: PreTrainedConfig, grid: Grid, generator: torch.Generator) -> Noise:
    """An image of noise with this grid."""
    import torch

    vision = config.vision_config
    merge = vision.spatial_merge_size
    size = torch.tensor([[1, grid.rows * merge, grid.cols * merge]])
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(size.prod()), width, generator=generator)
    return grid.tokens, {"pixel_values": pixels, "image_grid_thw": size}


def _family(
    name: str,
    aliases: Mapping[str, str],
    architecture: str,
    *,
    head_norms: tuple[str, str] | None = None,
    deepstack: str | None = None,
) -> Family:
    backbone = Backbone(
        (f"{name}_text",),
        position_axes=3,
        rotary=f"transformers.models.{name}.modeling_{name}:apply_rotary_pos_emb",
        head_norms=head_norms,
        deepstack=deepstack,
    )
    return Family(
        name=name,
        model_type=name,
        architecture=architecture,
        backbones=(backbone,),
        aliases=aliases,
        grids_of=grids_of,
        token_ids=token_ids,
        noise=noise,
        public_pairs=DOCUMENTS,
        takes_videos=True,
    )


QWEN2_VL = _family(
    "qwen2_vl",
    {
        "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
        "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
        "qwen2-vl-72b": "Qwen/Qwen2-VL-72B-Instruct",
        "qwen2-vl-tiny": "package:demo/qwen2_vl_tiny",
    },
    "Qwen2VLForConditionalGeneration",
)
QWEN2_5_VL = _family(
    "qwen2_5_vl",
    {
        "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
        "qwen2.5-vl-32b": "Qwen/Qwen2.5-VL-32B-Instruct",
        "qwen2.5-vl-72b": "Qwen/Qwen2.5-VL-72B-Instruct",
    },
    "Qwen2_5_VLForConditionalGeneration",
)
QWEN3_VL = _family(
    "qwen3_vl",
    {
        "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
        "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
        "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
        "qwen3-vl-32b": "Qwen/Qwen3-VL-32B-Instruct",
    },
    "Qwen3VLForConditionalGeneration",
    head_norms=("q_norm", "k_norm"),
    deepstack="deepstack_visual_embeds",
)
