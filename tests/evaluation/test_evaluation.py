"""KL and agreement follow their definitions; a plan that prunes nothing keeps everything."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import PICTURE, Subject

from yopo.data.prompts import Batch
from yopo.evaluation.accuracy import is_correct, normalise
from yopo.evaluation.fidelity import Recorded, answer_log_probs, compare, record_dense
from yopo.evaluation.timing import time_prefill
from yopo.runtime.install import pruned
from yopo.support.errors import DataError

ROWS = [[1, 5, 6, *PICTURE, 7, 8, 9, 10], [1, *PICTURE, 3, 4, 9]]
ANSWERS = [3, 2]


def answered() -> Batch:
    """A padded batch whose last 3 and 2 tokens are answers."""
    inputs = tiny.batch(ROWS)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, count in enumerate(ANSWERS):
        mask[row, -count:] = True
    return Batch(inputs, mask, (None, None))


def record(subject: Subject) -> list[Recorded]:
    batch = answered()
    return [Recorded(batch, [], answer_log_probs(subject.model, batch))]


def test_answers_are_predicted_from_the_token_before(subject: Subject) -> None:
    batch = answered()
    logits = tiny.logits(subject.model, batch.inputs).log_softmax(dim=-1)
    length = logits.shape[1]
    expected = [logits[0, length - 4 : length - 1], logits[1, length - 3 : length - 1]]
    found = answer_log_probs(subject.model, batch)
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)


def test_kl_and_agreement_follow_their_definition(subject: Subject) -> None:
    records = record(subject)
    plan = subject.random_plan(3)
    with pruned(subject.model, plan):
        found = compare(subject.model, records)
        ours = answer_log_probs(subject.model, records[0].batch).double()
    dense = records[0].log_probs.double()
    expected = torch.nn.functional.kl_div(ours, dense, log_target=True, reduction="none")
    assert found.kl == pytest.approx(expected.sum(-1).mean().item(), rel=1e-4)
    assert found.kl > 0.01
    agree = (dense.argmax(-1) == ours.argmax(-1)).double().mean().item()
    assert found.agreement == pytest.approx(agree)
    assert found.tokens == sum(ANSWERS)


def test_the_whole_plan_has_zero_kl(subject: Subject) -> None:
    records = record(subject)
    with pruned(subject.model, tiny.whole(subject)):
        found = compare(subject.model, records)
    assert abs(found.kl) < 1e-6 and found.agreement == 1.0


def test_evaluating_no_pairs_is_an_error(mha: Subject) -> None:
    with pytest.raises(DataError, match="no pairs"):
        record_dense(mha.model, None, [], batch_size=2, max_new_tokens=4)


def test_prefill_is_timed_in_pairs_and_leaves_no_hook(mha: Subject) -> None:
    plan = mha.random_plan(3)
    batch = answered()
    runs = 3
    found = time_prefill(mha.model, batch, lambda: pruned(mha.model, plan), runs=runs, warmup=1)
    assert found.runs == runs and found.batch_size == len(ROWS)
    assert min(found.dense_ms, found.pruned_ms, found.ratio) > 0
    decoder = mha.model.get_decoder()
    assert not decoder._forward_hooks and not decoder._forward_pre_hooks


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("Red.", ("red",), True),
        ("the red circle", ("Red circle",), True),
        ("a", ("a",), True),
        ("a", ("the",), False),
        ("red", ("blue", "green"), False),
        ("2", ("two", "2"), True),
        ("", ("red",), False),
    ],
)
def test_answers_match_after_normalisation(answer: str, accepted: tuple, right: bool) -> None:
    assert is_correct(answer, accepted) is right


def test_normalising_keeps_words_apart() -> None:
    assert normalise("top-left, A  corner!") == "top left corner"
