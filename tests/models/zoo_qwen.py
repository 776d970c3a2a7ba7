"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, videos, M-RoPE, DeepStack."""

from __future__ import annotations

from typing import Any

import tiny
import torch
import transformers
from transformers import PreTrainedModel
from zoo import IMAGE, TEXT, VIDEO, Entry, Picture

from yopo.plans.grid import Grid

START, END = 95, 96
MERGE, PATCH = 2, 4
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

IMAGE_SIZES = {"A": (3, 2), "B": (2, 3), "C": (2, 5), "L": (12, 10)}
FRAMES = (2, 3, 2)
"""Of the video ``V``: frames, rows, columns."""


def image(rows: int, cols: int) -> Picture:
    tokens = (START, *(IMAGE,) * (rows * cols), END)
    return Picture(tokens, (Grid(rows, cols),), (1, MERGE * rows, MERGE * cols))


def video(frames: int, rows: int, cols: int, *, run_per_frame: bool) -> Picture:
    """Make frames in one run, or each in its own run after a time stamp."""
    if run_per_frame:
        tokens = (40, START, *(VIDEO,) * (rows * cols), END) * frames
    else:
        tokens = (START, *(VIDEO,) * (frames * rows * cols), END)
    return Picture(tokens, (Grid(rows, cols),) * frames, (frames, MERGE * rows, MERGE * cols))


class QwenVL(Entry):
    placeholders = (IMAGE, VIDEO)
    prompts = {
        "video": [[1, 5, "V", 6, 7, 8]],
        "image and video, padded": [[1, "A", 5, "V", 6], [3, "V", 4, "B", "C", 7, 8]],
    }

    def __init__(self, name: str, prefix: str, vision: dict[str, Any], *, run_per_frame: bool):
        self.name, self.prefix, self.vision = name, prefix, vision
        self.pictures = {letter: image(*size) for letter, size in IMAGE_SIZES.items()}
        self.pictures["V"] = video(*FRAMES, run_per_frame=run_per_frame)

    def build(self) -> PreTrainedModel:
        text = TEXT | {"rope_parameters": ROPE}
        if self.prefix == "Qwen3VL":
            text["head_dim"] = 16
        config = getattr(transformers, f"{self.prefix}Config")(
            text_config=text,
            vision_config={"patch_size": PATCH, "spatial_merge_size": MERGE} | self.vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
            tie_word_embeddings=self.prefix == "Qwen2_5_VL",  # as in the smaller ones
        )
        return getattr(transformers, f"{self.prefix}ForConditionalGeneration")(config)

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for token, pixels, grid in (
            (IMAGE, "pixel_values", "image_grid_thw"),
            (VIDEO, "pixel_values_videos", "video_grid_thw"),
        ):
            sizes = [each.size for each in pictures if token in each.tokens]
            if sizes:
                made[grid] = torch.tensor(sizes)
                count = int(made[grid].prod(dim=1).sum())
                made[pixels] = torch.randn(count, 3 * 2 * PATCH**2, generator=generator)
        return made

    def finish(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        return inputs | {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}

    def next_turn(
        self, model: PreTrainedModel, whole: dict[str, Any], new: dict[str, Any]
    ) -> dict[str, Any]:
        """Positions follow from all images, features are needed only for the new ones."""
        tiny.skip_unless_takes_encoded(model)
        features = model.base_model.get_image_features(
            new["pixel_values"].to(model.dtype), new["image_grid_thw"], return_dict=True
        )
        turn = {name: value for name, value in whole.items() if name != "pixel_values"}
        return turn | {"mm_encoder_outputs": {"image": features}}


ENTRIES = [
    QwenVL(
        "qwen2-vl",
        "Qwen2VL",
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        run_per_frame=False,
    ),
    QwenVL(
        "qwen2.5-vl",
        "Qwen2_5_VL",
        {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        run_per_frame=False,
    ),
    QwenVL(
        "qwen3-vl",
        "Qwen3VL",
        {
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        run_per_frame=True,
    ),
]
