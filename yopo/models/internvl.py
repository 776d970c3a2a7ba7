"""InternVL (2.0 after ``yopo convert``, 2.5 and later as ``-hf``): square tiles.

The model does not know how an image was cut into tiles, so every tile counts as an image: visual
tokens have no neighbors outside their tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from yopo.models.family import Backbone, Family, ImageInfo, Run, count_tokens, square_grids
from yopo.models.public_pairs import DOCUMENTS
from yopo.plans.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

QWEN3 = Backbone(("qwen3",), head_norms=("q_norm", "k_norm"))
PHI3 = Backbone(
    ("phi3",),
    query="qkv_proj",
    key="qkv_proj",
    value="qkv_proj",
    gate="gate_up_proj",
    up="gate_up_proj",
    activation="activation_fn",
    residual_dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
    rotary="transformers.models.phi3.modeling_phi3:apply_rotary_pos_emb",
)


def grids_of(
    config: PreTrainedConfig, rows: Sequence[Sequence[Run]], images: ImageInfo
) -> list[tuple[Grid, ...]]:
    """One square grid per tile: the tower's patches, reduced by the pixel shuffle."""
    vision = config.vision_config
    side = int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)
    return square_grids(count_tokens(rows), side * side)


INTERNVL = Family(
    name="internvl",
    model_type="internvl",
    architecture="InternVLForConditionalGeneration",
    backbones=(Backbone(("qwen2", "llama")), QWEN3, PHI3),
    aliases={
        "internvl2-4b": "OpenGVLab/InternVL2-4B",
        "internvl2-8b": "OpenGVLab/InternVL2-8B",
        "internvl2-26b": "OpenGVLab/InternVL2-26B",
        "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
        "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
        "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
        "internvl3.5-1b": "OpenGVLab/InternVL3_5-1B-HF",
        "internvl3.5-2b": "OpenGVLab/InternVL3_5-2B-HF",
        "internvl3.5-4b": "OpenGVLab/InternVL3_5-4B-HF",
        "internvl3.5-8b": "OpenGVLab/InternVL3_5-8B-HF",
        "internvl3.5-14b": "OpenGVLab/InternVL3_5-14B-HF",
        "internvl3.5-38b": "OpenGVLab/InternVL3_5-38B-HF",
        "internvl-tiny": "package:demo/internvl_tiny",
    },
    grids_of=grids_of,
    originals=("internvl_chat",),
    public_pairs=DOCUMENTS,
)
