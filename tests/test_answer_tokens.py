"""Prompt ends are declared for one block, one thread and one forward."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from yopo.models.answer_tokens import forced_ends, teacher_forced
from yopo.support.errors import ModelError

ANSWERS = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()


def test_prompts_end_before_their_answers() -> None:
    assert forced_ends(2, 5) is None
    with teacher_forced(ANSWERS):
        assert forced_ends(2, 5).tolist() == [2, 3]
        with teacher_forced(None):
            assert forced_ends(2, 5) is None
        assert forced_ends(2, 5).tolist() == [2, 3]
    assert forced_ends(2, 5) is None


def test_prompt_ends_are_forgotten_after_the_block_even_if_it_fails() -> None:
    with pytest.raises(ZeroDivisionError), teacher_forced(ANSWERS):
        raise ZeroDivisionError
    assert forced_ends(2, 5) is None


def test_other_threads_do_not_see_prompt_ends() -> None:
    heard = []
    with teacher_forced(ANSWERS):
        thread = Thread(target=lambda: heard.append(forced_ends(2, 5)))
        thread.start()
        thread.join()
    assert heard == [None]


def test_answers_of_another_forward_are_refused() -> None:
    with teacher_forced(ANSWERS), pytest.raises(ModelError, match=r"\(2, 5\).*\(2, 6\)"):
        forced_ends(2, 6)
