"""Marks the answer tokens of a forward, for methods that look at where a prompt ends.

In decoding, a prompt is prefilled before its answer exists. When both are fed in one sequence
(teacher forcing), a method that looks at the prompt's last token has to be told where that is; the
dense model and a plan do not need it. The caller sets it here, the method reads it here, and
neither imports the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from yopo.support.errors import ModelError

_ANSWERS: ContextVar[torch.Tensor | None] = ContextVar("yopo_answer_tokens", default=None)


@contextmanager
def teacher_forced(answers: torch.Tensor | None) -> Iterator[None]:
    """Announce the answer tokens of the forwards in this block.

    Args:
        answers: (batch, sequence) bool, True on answer tokens, which end their rows; None means
            there are none.
    """
    token = _ANSWERS.set(answers)
    try:
        yield
    finally:
        _ANSWERS.reset(token)


def forced_ends(batch: int, length: int) -> torch.Tensor | None:
    """Where the prompts of a forward end, as announced by ``teacher_forced``.

    Args:
        batch: Rows of the forward.
        length: Tokens per row.

    Returns:
        (batch,) int64, positions of the prompts' last tokens; None outside of ``teacher_forced``.

    Raises:
        ModelError: The announced answers belong to a forward of another shape.
    """
    answers = _ANSWERS.get()
    if answers is None:
        return None
    if tuple(answers.shape) != (batch, length):
        raise ModelError(
            f"The teacher-forced answers have shape {tuple(answers.shape)}, but the forward has "
            f"{(batch, length)}.",
            remedy="Run one forward of exactly these rows inside teacher_forced.",
        )
    return length - 1 - answers.sum(dim=1)


def prompt_ends(places: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Where the prompts of a forward end, as announced or at their last tokens: (batch,) int64.

    Args:
        places: (batch, length) int64, positions of the forward's tokens.
        real: (batch, length) bool, False on padding; None: no padding.
    """
    forced = forced_ends(*places.shape)
    if forced is not None:
        return forced.to(places.device)
    return places[:, -1] if real is None else (places * real).amax(dim=1)
