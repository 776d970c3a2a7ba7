"""Tiny randomly initialised models of every family, and prompts for them.

Each module ``zoo_NAME.py`` next to this one describes a family's models in a list ``ENTRIES`` of
:class:`Entry` objects; the properties are tested on all of them. Prompts are rows of token ids and
letters: a letter is an image that the entry knows (``A`` and ``B`` always, ``L`` is large).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import PreTrainedModel

from yopo.models.family import Family, shape_of
from yopo.models.fingerprint import fingerprint_of_decoder
from yopo.models.registry import family_of
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelIdentity, PruningPlan, Workload

Row = Sequence[int | str]
"""One prompt: token ids, and letters for images."""

PAD, BOS, EOS = 0, 1, 99
IMAGE, VIDEO = 98, 97

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "max_position_embeddings": 512,
}
"""What the text configurations of all families have in common."""

PROMPTS: dict[str, list[Row]] = {
    "one image": [[1, 5, 6, "A", 7, 8, 9, 10]],
    "two images": [[1, 5, "A", 6, "B", 7, 8, 9]],
    "padded, different images": [[1, 5, 6, "B", 7, 8], [1, "A", 3, 4, "B", "A", 9]],
    "one without": [[1, 5, 6, "B", 7, 8], [1, 2, 3]],
    "text": [[1, 5, 6, 7], [2, 3]],
}


@dataclass(frozen=True)
class Picture:
    """An image as a prompt sees it.

    Attributes:
        tokens: Tokens that the processor writes for it.
        grids: Its visual tokens' grids.
        size: Whatever the entry needs for drawing it.
    """

    tokens: tuple[int, ...]
    grids: tuple[Grid, ...]
    size: Any


class Entry:
    """One model of the zoo. Subclasses describe a family; nothing here knows one.

    Attributes:
        name: In test ids.
        pictures: Letter -> image; ``A`` and ``B`` (of another size if there are sizes), ``L``.
        prompts: Prompts of this entry in addition to the common ones.
        placeholders: Token ids that count as visual, and must not be generated.
    """

    name: str
    pictures: dict[str, Picture]
    prompts: dict[str, list[Row]] = {}
    placeholders: tuple[int, ...] = (IMAGE,)

    def build(self) -> PreTrainedModel:
        """Build the model; weights come from the caller's seed and are perturbed afterwards."""
        raise NotImplementedError

    def pixels(self, pictures: list[Picture], generator: torch.Generator) -> dict[str, Any]:
        """Return the processor's output for images, in prompt order, except for the token ids."""
        raise NotImplementedError

    def finish(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs that follow from the token ids."""
        return inputs

    def next_turn(
        self, model: PreTrainedModel, whole: dict[str, Any], new: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments of ``generate`` for a conversation whose first images are cached.

        Args:
            model: The model, pruned.
            whole: Inputs of the whole conversation.
            new: Inputs of the new turn only.
        """
        ids = {name: whole[name] for name in ("input_ids", "attention_mask")}
        return {**new, **ids}


@dataclass
class Specimen:
    """A built entry.

    Attributes:
        entry: What it was built from.
        model: In float32.
        oracle: The same weights in float64 throughout.
    """

    entry: Entry
    model: PreTrainedModel
    oracle: PreTrainedModel = field(init=False)

    def __post_init__(self) -> None:
        self.oracle = tiny.exact(self.model)

    @cached_property
    def family(self) -> Family:
        return family_of(self.model.config)

    @cached_property
    def identity(self) -> ModelIdentity:
        fingerprint = fingerprint_of_decoder(self.model.get_decoder())
        shape = shape_of(self.model.config)
        return ModelIdentity(f"tiny-{self.entry.name}", self.family.name, shape, fingerprint)

    def workload(self, row: Row) -> Workload:
        """The workload of one prompt."""
        grids: list[Grid] = []
        text, texts = 0, []  # text tokens so far, and before each visual token
        for piece in row:
            tokens = self.entry.pictures[piece].tokens if isinstance(piece, str) else (piece,)
            for token in tokens:
                if token in self.entry.placeholders:
                    texts.append(text)
                else:
                    text += 1
            if isinstance(piece, str):
                grids += self.entry.pictures[piece].grids
        starts = list(accumulate(grid.tokens for grid in grids[:-1]))
        between = tuple(texts[start] - texts[start - 1] for start in starts)
        tall = {
            texts[start + grid.cols] - texts[start]
            for start, grid in zip((0, *starts), grids, strict=True)
            if grid.rows > 1
        }
        return Workload(tuple(grids), text, texts[0], between, max(tall, default=0))

    def plan(self, seed: int, **fixed: Any) -> PruningPlan:
        """A random plan, with its tensors."""
        plan = tiny.random_plan(self.identity, random.Random(seed), **fixed)
        return replace(plan, tensors=tiny.random_tensors(plan, seed))

    def inputs(self, rows: Sequence[Row], seed: int = 0) -> dict[str, Any]:
        """A left-padded batch."""
        entry, shown, written = self.entry, [], []
        for row in rows:
            tokens: list[int] = []
            for piece in row:
                if isinstance(piece, str):
                    shown.append(entry.pictures[piece])
                    tokens += shown[-1].tokens
                else:
                    tokens.append(piece)
            written.append(tokens)
        width = max(map(len, written))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in written])
        real = [[0] * (width - len(row)) + [1] * len(row) for row in written]
        inputs = {"input_ids": ids, "attention_mask": torch.tensor(real)}
        if shown:
            inputs |= entry.pixels(shown, torch.Generator().manual_seed(seed))
        return entry.finish(inputs)

    def new_images(self, whole: dict[str, Any], row: Row) -> dict[str, Any]:
        """Return the processor's output for one row's images, with their pixels from ``whole``."""
        alone = self.inputs([row])
        for name, value in alone.items():
            if name not in ("input_ids", "attention_mask") and value.shape != whole[name].shape:
                alone[name] = whole[name][-len(value) :]
        return {
            name: value
            for name, value in alone.items()
            if name not in ("input_ids", "attention_mask")
        }

    def text_positions(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(batch, sequence) bool: text tokens, padding excluded."""
        visual = torch.isin(inputs["input_ids"], torch.tensor(self.entry.placeholders))
        return inputs["attention_mask"].bool() & ~visual

    def generate(
        self, model: PreTrainedModel, inputs: dict[str, Any], **options: Any
    ) -> torch.Tensor:
        """Return token ids, prompt included; placeholders are never generated.

        Three new tokens: of the prefill, of a step, and of a step that reads what a step cached.
        """
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False} | options
        options["suppress_tokens"] = list(self.entry.placeholders)
        return model.generate(**tiny.as_dtype(inputs, model.dtype), **options)


def build(entry: Entry) -> Specimen:
    """Build an entry with random weights, biases and norms; always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(entry.name))
        model = entry.build().eval()
        with torch.no_grad():
            for name, parameter in model.get_decoder().named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return Specimen(entry, model)


def all_entries() -> Iterator[Entry]:
    """The entries of every ``zoo_NAME.py`` here."""
    for path in sorted(Path(__file__).parent.glob("zoo_*.py")):
        yield from import_module(path.stem).ENTRIES
