"""The words of calibration questions, from which reductions take constants."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.pairs import Pair
from yopo.data.prompts import batches, encode_for
from yopo.models.registry import family_of
from yopo.reduction.method import Method


def with_constants(
    method: Method | None,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Iterable[Pair],
    *,
    batch_size: int = 8,
) -> Method | None:
    """A reduction with the constants that it takes from questions, if it takes any.

    Args:
        method: The reduction.
        model: A multimodal model of a supported family.
        processor: Its processor.
        pairs: Calibration pairs.
        batch_size: Pairs encoded together.
    """
    if method is None or not method.needs_questions:
        return method
    return method.calibrated(questions_of(model, processor, pairs, batch_size=batch_size))


def questions_of(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: Iterable[Pair], *, batch_size: int = 8
) -> list[set[int]]:
    """The token ids of every pair's question; arguments as for :func:`with_constants`."""
    visual = torch.tensor(family_of(model.config).token_ids(model.config))
    questions: list[set[int]] = []
    for group in batches(pairs, batch_size):
        inputs = encode_for(model, processor, group).inputs
        mask = inputs["attention_mask"].bool()
        for ids, real in zip(inputs["input_ids"].cpu(), mask.cpu(), strict=True):
            questions.append(_question(ids[real], visual))
    return questions


def _question(ids: torch.Tensor, visual: torch.Tensor) -> set[int]:
    """The text after the last image; all of it, if there is none after it."""
    is_visual = torch.isin(ids, visual)
    last = int(is_visual.nonzero().max()) if bool(is_visual.any()) else -1
    after = ids[last + 1 :]
    return set((after if len(after) else ids[~is_visual]).tolist())
