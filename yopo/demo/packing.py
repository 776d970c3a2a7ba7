"""Training batches for the demo model: scenes and turns as tensors.

The visual tokens are by far the longest part of a prompt, so a row holds a dozen turns behind one
copy of them: an image is worth many questions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from yopo.demo.build import PATCH_SIZE
from yopo.demo.scenes import IMAGE_SIZE, Scene, Turn, split_scenes, turns
from yopo.demo.vocabulary import COLORS, GRID, SHAPES

IGNORED = -100  # the label that the loss leaves out

_GRID_PATCHES = IMAGE_SIZE // PATCH_SIZE
_NUM_VISUAL = _GRID_PATCHES**2
_MIN_PATCH_PIXELS = 5  # fewer pixels of an object do not make a patch its own
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


def tower_batches(pixels: Pixels, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pixel values (scene, 3, 64, 64) and labels (scene, patch, 3)."""
    scenes = split_scenes("train", seed=seed)
    while True:
        batch = [next(scenes) for _ in range(batch_size)]
        yield pixels(batch), torch.stack([patch_labels(scene) for scene in batch])


class Packer:
    """Packs several turns about one image into one training sequence.

    Three rows in four are packed so that a turn sees the image and itself only, at the positions
    that it would have alone: many single-question prompts for the price of one image. Otherwise
    earlier answers would give later ones away. The fourth is a plain conversation, as the chat
    template writes it.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        """Take tokenizer and image token from the processor."""
        self.tokenizer = processor.tokenizer
        self.image_id = processor.image_token_id
        self.user, self.assistant = (self._ids(text)[0] for text in ("USER:", "ASSISTANT:"))
        self.known: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _cached(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self._ids(text)
        return self.known[text]

    def row(self, asked: tuple[Turn, ...], is_isolated: bool) -> tuple[Tensor, ...]:
        """Pack one row.

        Returns:
            ids, labels, positions and owner, each (token,) int64. A token sees the earlier ones
            whose owner is 0 (the image prefix) or its own.
        """
        prefix = [self.tokenizer.bos_token_id, self.user, *[self.image_id] * _NUM_VISUAL]
        ids, labels = list(prefix), [IGNORED] * len(prefix)
        positions, owner = list(range(len(prefix))), [0] * len(prefix)
        for index, turn in enumerate(asked):
            question = [*self._cached(turn.question), self.assistant]
            if index and not is_isolated:
                question.insert(0, self.user)
            answer = [*self._cached(turn.answer), self.tokenizer.eos_token_id]
            start = len(prefix) if is_isolated else len(ids)
            length = len(question) + len(answer)
            if len(ids) + length > _ROW_LENGTH:
                break
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
            positions += range(start, start + length)
            owner += [1 + index if is_isolated else 0] * length
        fills = (self.tokenizer.pad_token_id, IGNORED, 0, 0)
        missing = _ROW_LENGTH - len(ids)
        columns = zip((ids, labels, positions, owner), fills, strict=True)
        return tuple(torch.tensor(column + [fill] * missing) for column, fill in columns)

    def batch(self, batch: list[tuple[Turn, ...]]) -> dict[str, Tensor]:
        """Return input_ids, labels, position_ids (row, token) and the mask (row, 1, query, key)."""
        rows = [self.row(asked, index % 4 != 3) for index, asked in enumerate(batch)]
        ids, labels, positions, owner = (torch.stack(column) for column in zip(*rows, strict=True))
        same = (owner[:, :, None] == owner[:, None]) | (owner[:, None] == 0)
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "attention_mask": same.tril()[:, None],  # bool, True where query sees key
        }


def decoder_batches(
    processor: LlavaProcessor, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield model inputs with labels on the answers only."""
    pixels, packer = Pixels(processor), Packer(processor)
    talks = turns("train", seed=seed)
    while True:
        scenes, asked = zip(*(next(talks) for _ in range(batch_size)), strict=True)
        yield {"pixel_values": pixels(list(scenes)), **packer.batch(list(asked))}
