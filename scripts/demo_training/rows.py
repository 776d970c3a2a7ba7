"""Training rows: several turns about one image in one sequence.

The visual tokens are by far the longest part of a prompt, so a row holds a dozen turns after one
copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from yopo.demo.task import Turn

IGNORED = -100  # the label that the loss ignores


@dataclass(frozen=True)
class ChatForm:
    """A chat template as token ids, and how long rows are.

    Attributes:
        prefix: Everything before the first question, visual tokens included.
        next_position: The position of the first token after the prefix.
        turn: The tokens that begin a further question.
        reply: The tokens between question and answer.
        end: The token that ends an answer.
        row_length: Number of tokens in a row; fixed, so that a decoder is compiled only once.
    """

    prefix: tuple[int, ...]
    next_position: int
    turn: tuple[int, ...]
    reply: tuple[int, ...]
    end: int
    row_length: int


class RowPacker:
    """Packs several turns about one image into one training sequence.

    Three rows in four are packed so that a turn sees only the image and itself, at the positions
    that it would have by itself: many single-question prompts for the price of one image.
    Otherwise earlier answers would give later ones away. The fourth row is a plain conversation, as
    the chat template writes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: ChatForm) -> None:
        """Keep the tokenizer and the form of rows."""
        self.tokenizer = tokenizer
        self.form = form
        self.known: dict[str, list[int]] = {}

    def _cached(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.known[text]

    def row(self, asked: tuple[Turn, ...], is_isolated: bool) -> tuple[Tensor, ...]:
        """Pack one row; turns that no longer fit are left out.

        Returns:
            ids, labels, positions and owner, each (token,) int64. A token sees the earlier ones
            whose owner is 0 (the image prefix) or its own. The prefix's positions count its tokens.
        """
        form, num_prefix = self.form, len(self.form.prefix)
        ids, labels = list(form.prefix), [IGNORED] * num_prefix
        positions, owner = list(range(num_prefix)), [0] * num_prefix
        for index, turn in enumerate(asked):
            question = [*self._cached(turn.question), *form.reply]
            if index and not is_isolated:
                question = [*form.turn, *question]
            answer = [*self._cached(turn.answer), form.end]
            start = form.next_position + (0 if is_isolated else len(ids) - num_prefix)
            length = len(question) + len(answer)
            if len(ids) + length > form.row_length:
                break
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
            positions += range(start, start + length)
            owner += [1 + index if is_isolated else 0] * length
        fills = (self.tokenizer.pad_token_id, IGNORED, 0, 0)
        missing = form.row_length - len(ids)
        columns = zip((ids, labels, positions, owner), fills, strict=True)
        return tuple(torch.tensor(column + [fill] * missing) for column, fill in columns)

    def batch(self, batch: Sequence[tuple[Turn, ...]]) -> dict[str, Tensor]:
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
