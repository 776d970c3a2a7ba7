"""Prompts that are longer than a model's context: found before the model runs, and left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from yopo.data.left_out import BadPair, LeftOut
from yopo.data.pairs import Pair, Pairs
from yopo.data.processing import processed
from yopo.data.prompts import prompt_text
from yopo.support.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

SURELY_SHORT = 4
"""A prompt of one image whose text fills less than this fraction of the context is not encoded to
count its tokens: models leave room for an image."""


def without_long_prompts(
    pairs: Pairs, processor: ProcessorMixin, config: PreTrainedConfig, *, room: int, strict: bool
) -> Pairs:
    """A source without the pairs whose prompts do not fit a model, with a warning about them.

    Args:
        pairs: The source; read once here.
        processor: The model's.
        config: The model's configuration.
        room: Tokens of an answer that has to fit as well.
        strict: Whether such a pair is an error.

    Raises:
        DataError: No pair is left; or, under ``strict``, one does not fit.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return pairs
    left_out, long, count = LeftOut(pairs.name, strict=strict), set[int](), 0
    for number, pair in enumerate(pairs):
        count += 1
        tokens = _tokens(processor, pair, context)
        if tokens + room > context:
            long.add(number)
            left_out.add(_too_long(pair, tokens, room, context))
    if not long:
        return pairs
    left_out.refuse_if_nothing_is_left(count - len(long))
    left_out.report(count)

    def read() -> Iterator[Pair]:
        return (pair for number, pair in enumerate(pairs) if number not in long)

    total = None if pairs.total is None else pairs.total - len(long)
    return replace(pairs, total=total, read=read)


def _tokens(processor: ProcessorMixin, pair: Pair, context: int) -> int:
    """Tokens of a pair's prompt; only those of its text, where it is surely short enough."""
    prompt = prompt_text(processor, pair)
    text = len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if len(pair.images) == 1 and not pair.videos and text * SURELY_SHORT < context:
        return text
    try:
        made = processed(processor, [prompt], [pair])
    except (ValueError, DataError):  # encoding it with the others says what is wrong
        return text
    return made["input_ids"].shape[1]


def _too_long(pair: Pair, tokens: int, room: int, context: int) -> BadPair:
    return BadPair(
        f"{pair.where}: the prompt has {tokens:,} tokens, which with {room:,} for the answer are "
        f"more than the model's context of {context:,}.",
        reason="whose prompt is longer than the model's context",
        remedy="Shorten the question, or remove the pair from the data.",
    )
