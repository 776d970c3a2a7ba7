"""The differences between the demo models' trainings, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from demo_training import build, packing
from demo_training import glyphs_build as glyph_build
from demo_training import glyphs_packing as glyph_packing
from yopo.demo import LLAVA_TINY, QWEN2_VL_TINY, scenes
from yopo.demo.glyphs import grids
from yopo.demo.task import Task


@dataclass(frozen=True)
class Stage:
    """A stage of training: what it trains, for how long and how fast."""

    name: str
    num_steps: int
    batch_size: int
    learning_rate: float
    final_rate: float


@dataclass(frozen=True)
class Recipe:
    """How a demo model is built, trained and evaluated.

    Attributes:
        task: The task that the model learns.
        home: The directory of the trained model.
        build_model: Builds the model with random weights, from `seed`.
        build_processor: Builds its processor.
        save_processor: Saves the processor in a directory.
        width: Width of the features that `features` gives.
        labels: The labels that the tower learns for visual tokens, and their numbers of classes.
        tower: The part that the first stage trains: the vision tower, with its patch merger if it
            has one. (Trained in the second stage, the merger forgets whatever the questions learned
            first do not need.)
        after_tower: The modules that the second stage trains.
        features: Runs a model's tower on a batch of images: (picture, token, width).
        tower_batches: (processor, batch size, seed) -> images and labels (picture, token, label).
        decoder_batches: (processor, batch size, seed) -> the model's inputs and labels.
        stages: The two stages.
        shifted: A variant of the task not seen in training: the same questions, other pictures.
        is_compiled: Whether to compile the decoder for training, where that is faster.
    """

    task: Task
    home: Path
    build_model: Callable[..., PreTrainedModel]
    build_processor: Callable[[], ProcessorMixin]
    save_processor: Callable[[Any, Path], None]
    width: int
    labels: dict[str, int]
    tower: Callable[[PreTrainedModel], nn.Module]
    after_tower: Callable[[PreTrainedModel], list[nn.Module]]
    features: Callable[[PreTrainedModel, Any], Tensor]
    tower_batches: Callable[[Any, int, int], Iterator[tuple[Any, Tensor]]]
    decoder_batches: Callable[[Any, int, int], Iterator[dict[str, Tensor]]]
    stages: tuple[Stage, Stage]
    shifted: Task | None = None
    is_compiled: bool = False


def _qwen2_vl_features(model: PreTrainedModel, images: dict[str, Tensor]) -> Tensor:
    sizes = images["image_grid_thw"]
    merged = model.model.visual(images["pixel_values"], grid_thw=sizes).pooler_output
    return merged.unflatten(0, (len(sizes), -1))


RECIPES = {
    "llava-tiny": Recipe(
        task=scenes.TASK,
        home=LLAVA_TINY,
        build_model=build.build_model,
        build_processor=build.build_processor,
        save_processor=lambda processor, directory: processor.save_pretrained(directory),
        width=build.HIDDEN_SIZE,
        labels=packing.LABELS,
        tower=lambda model: model.model.vision_tower,
        after_tower=lambda model: [
            model.model.multi_modal_projector,
            model.model.language_model,
            model.lm_head,
        ],
        features=lambda model, pixels: model.model.vision_tower(pixels).last_hidden_state[:, 1:],
        tower_batches=packing.tower_batches,
        decoder_batches=packing.decoder_batches,
        stages=(Stage("tower", 800, 32, 1e-3, 1e-4), Stage("decoder", 3400, 16, 1e-3, 1e-5)),
        is_compiled=True,
    ),
    "qwen2-vl-tiny": Recipe(
        task=grids.TASK,
        shifted=grids.SHIFTED,
        home=QWEN2_VL_TINY,
        build_model=glyph_build.build_model,
        build_processor=glyph_build.build_processor,
        save_processor=glyph_build.save_processor,
        width=glyph_build.HIDDEN_SIZE,
        labels=glyph_packing.LABELS,
        tower=lambda model: model.model.visual,
        after_tower=lambda model: [model.model.language_model, model.lm_head],
        features=_qwen2_vl_features,
        tower_batches=glyph_packing.tower_batches,
        decoder_batches=glyph_packing.decoder_batches,
        stages=(Stage("tower", 1000, 32, 2e-3, 1e-4), Stage("decoder", 2400, 16, 1e-3, 1e-5)),
    ),
}
