"""Baselines are evaluated like plans: same pairs and records, answers generated and compared."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from tiny import PICTURE, Subject

from yopo.baselines.downsample import Downsampling
from yopo.baselines.fastv import FastV
from yopo.baselines.install import baseline
from yopo.baselines.vtw import TokenWithdrawal
from yopo.data.prompts import Batch, load_processor
from yopo.data.sources import open_pairs
from yopo.evaluation.evaluate import evaluate, measure_kept
from yopo.evaluation.fidelity import Recorded, answer_log_probs, compare, record_dense
from yopo.models.answer_tokens import teacher_forced
from yopo.models.family import shape_of
from yopo.models.fingerprint import fingerprint_of_decoder
from yopo.models.registry import resolve
from yopo.plans.schema import ModelIdentity, full_plan
from yopo.serving.loading import load_dense

SOME = {
    "vtw": TokenWithdrawal(2),
    "fastv": FastV(2, share=0.4),
    "downsample": Downsampling(scale=(0.5, 0.5)),
}
PROMPTS = [[1, 5, 6, *PICTURE, 7, 8, 9], [1, *PICTURE, 3, 4]]
ANSWERS = [[10, 11, 12], [9, 13]]


def answered() -> Batch:
    inputs = tiny.batch([row + said for row, said in zip(PROMPTS, ANSWERS, strict=True)])
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, said in enumerate(ANSWERS):
        mask[row, -len(said) :] = True
    return Batch(inputs, mask, (None, None))


@pytest.mark.parametrize("name", SOME)
def test_answers_are_predicted_as_in_decoding(subject: Subject, name: str) -> None:
    """Answers follow the prefilled prompt token by token: FastV must not see them when ranking."""
    batch = answered()
    with torch.no_grad(), baseline(subject.model, SOME[name]):
        found = answer_log_probs(subject.model, batch)
        expected = []
        for row, (prompt, said) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
            inputs = tiny.batch([prompt])
            inputs["pixel_values"] = batch.inputs["pixel_values"][row : row + 1]
            out = subject.model(**inputs, use_cache=True)
            for token in said:
                expected.append(out.logits[0, -1].log_softmax(dim=-1))
                step, cache = torch.tensor([[token]]), out.past_key_values
                out = subject.model(input_ids=step, past_key_values=cache)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)


def test_answer_tokens_would_change_the_ranking(mha: Subject) -> None:
    """This is why ``teacher_forced`` exists."""
    batch = answered()
    with torch.no_grad(), baseline(mha.model, SOME["fastv"]):
        plain = mha.model(**batch.inputs).logits
        with teacher_forced(batch.answer_mask):
            forced = mha.model(**batch.inputs).logits
        again = mha.model(**batch.inputs).logits
    assert torch.equal(plain, again) and not torch.allclose(plain, forced, atol=1e-3)


def test_a_baseline_that_drops_nothing_has_no_kl(subject: Subject) -> None:
    batch = answered()
    records = [Recorded(batch, ANSWERS, answer_log_probs(subject.model, batch))]
    with baseline(subject.model, FastV(2, share=1.0)):
        same = compare(subject.model, records)
    with baseline(subject.model, TokenWithdrawal(1)):
        other = compare(subject.model, records)
    assert abs(same.kl) < 1e-6 and same.agreement == 1 and other.kl > 0.01


def test_baselines_answer_the_demo_pairs() -> None:
    """On the trained model, dropping nothing loses nothing; dropping all is mere guessing."""
    source = resolve("llava-tiny")
    model, processor = load_dense(source), load_processor(source.location)
    pairs = list(open_pairs("demo:heldout", samples=48, seed=0))
    records = record_dense(model, processor, pairs, batch_size=24, max_new_tokens=8)
    measure = partial(measure_kept, model, processor, records, max_new_tokens=8)
    whole = measure(lambda: baseline(model, Downsampling()))
    assert whole.pairs == whole.same_answers == 48
    assert whole.accuracy.dense == whole.accuracy.pruned > 40
    assert sum(each.total for each in whole.by_kind.values()) == 48
    blind = measure(lambda: baseline(model, TokenWithdrawal(0)))
    assert blind.accuracy.dense == whole.accuracy.dense
    assert blind.accuracy.pruned < 0.8 * whole.accuracy.dense
    assert blind.fidelity.kl > 100 * max(whole.fidelity.kl, 1e-6)


def test_a_plan_that_drops_nothing_is_evaluated_the_same_way() -> None:
    source = resolve("llava-tiny")
    model, processor = load_dense(source), load_processor(source.location)
    fingerprint = fingerprint_of_decoder(model.get_decoder())
    identity = ModelIdentity("llava-tiny", "llava", shape_of(model.config), fingerprint)
    plan = full_plan(identity, tiny.workload(side=8))
    pairs = list(open_pairs("demo:heldout", samples=8, seed=0))
    found = evaluate(model, processor, plan, pairs, batch_size=8, max_new_tokens=8, timing_runs=0)
    assert found.pairs == found.same_answers == 8 and found.prefill is None
    assert found.accuracy.dense == found.accuracy.pruned > 0
    assert found.fidelity.agreement == 1 and abs(found.fidelity.kl) < 1e-6
