"""Training batches for the model that sees scenes: scenes and turns as tensors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from demo_training.build import PATCH_SIZE
from demo_training.rows import ChatForm, RowPacker
from yopo.demo.scenes import IMAGE_SIZE, Scene, split_scenes, turns
from yopo.demo.vocabulary import COLORS, GRID, SHAPES

LABELS = {"color": 1 + len(COLORS), "shape": 1 + len(SHAPES), "cell": 1 + GRID * GRID}
"""The labels that `patch_labels` gives a patch, and their numbers of classes; 0: background."""

_GRID_PATCHES = IMAGE_SIZE // PATCH_SIZE
_NUM_VISUAL = _GRID_PATCHES**2
_MIN_PATCH_PIXELS = 5  # a patch with fewer pixels of an object is not labeled with it
_ROW_LENGTH = 220  # twelve turns about an image; fixed, so that the decoder is compiled once


class Pixels:
    """Turns scenes into the processor's pixel values, without its per-call overhead."""

    def __init__(self, processor: LlavaProcessor) -> None:
        """Take mean and deviation from the processor."""
        self.mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)

    def __call__(self, scenes: list[Scene]) -> Tensor:
        """Return (scene, 3, 64, 64) float32."""
        images = torch.from_numpy(np.stack([np.asarray(scene.render()) for scene in scenes]))
        return (images.permute(0, 3, 1, 2) / 255 - self.mean) / self.std


def patch_labels(scene: Scene) -> Tensor:
    """Return (patch, 3) int64: color, shape and cell of each patch's object; 0 is background."""
    indices = np.asarray(scene.render_indices())
    blocks = indices.reshape(_GRID_PATCHES, PATCH_SIZE, _GRID_PATCHES, PATCH_SIZE).swapaxes(1, 2)
    blocks = blocks.reshape(_NUM_VISUAL, -1, 1)
    pixels = (blocks == np.arange(1, 1 + len(scene.objects))).sum(1)  # (patch, object)
    colors = list(COLORS)
    names = [
        (1 + colors.index(o.color), 1 + SHAPES.index(o.shape), 1 + o.row * GRID + o.col)
        for o in scene.objects
    ]
    covered = pixels.max(1) >= _MIN_PATCH_PIXELS
    return torch.from_numpy(np.array(names)[pixels.argmax(1)] * covered[:, None])


def tower_batches(
    processor: LlavaProcessor, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pixel values (scene, 3, 64, 64) and labels (scene, patch, 3)."""
    pixels, scenes = Pixels(processor), split_scenes("train", seed=seed)
    while True:
        batch = [next(scenes) for _ in range(batch_size)]
        yield pixels(batch), torch.stack([patch_labels(scene) for scene in batch])


class Packer(RowPacker):
    """Packs turns after one image's visual tokens in the form of LLaVA's chat template."""

    def __init__(self, processor: LlavaProcessor) -> None:
        """Take tokenizer and image token from the processor."""
        tokenizer = processor.tokenizer
        user, assistant = tokenizer.convert_tokens_to_ids(["USER:", "ASSISTANT:"])
        prefix = (tokenizer.bos_token_id, user, *[processor.image_token_id] * _NUM_VISUAL)
        form = ChatForm(
            prefix=prefix,
            next_position=len(prefix),
            turn=(user,),
            reply=(assistant,),
            end=tokenizer.eos_token_id,
            row_length=_ROW_LENGTH,
        )
        super().__init__(tokenizer, form)


def decoder_batches(
    processor: LlavaProcessor, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield model inputs with labels on the answers only."""
    pixels, packer = Pixels(processor), Packer(processor)
    talks = turns("train", seed=seed)
    while True:
        scenes, asked = zip(*(next(talks) for _ in range(batch_size)), strict=True)
        yield {"pixel_values": pixels(list(scenes)), **packer.batch(asked)}
