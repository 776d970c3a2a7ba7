"""How far a pruned model diverges from the dense one, token by token, without labels.

The dense model answers greedily; both models then predict that answer's tokens from the same
prefix. KL is ``KL(dense || pruned)`` per answer token, agreement the share of tokens with the same
most likely prediction. The end token counts: knowing when to stop is part of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.pairs import Pair
from yopo.data.prompts import Batch, batches, encode_for
from yopo.data.sizes import by_size
from yopo.evaluation.kinds import MIN_GROUP, kinds_of
from yopo.fitting.states import InHostMemory, Room
from yopo.models.answer_tokens import teacher_forced
from yopo.models.devices import device_of
from yopo.models.offloaded import named_weights
from yopo.models.registry import family_of
from yopo.models.turns import in_turns
from yopo.support.console import track
from yopo.support.errors import DataError, ModelError
from yopo.support.finite import check_weights, is_finite
from yopo.support.ranks import gathered, mine
from yopo.support.work_dir import NoWork, Stage, Work

Generate = Callable[..., torch.Tensor]
"""A model's ``generate``, from a prompt to token ids that include it: (batch, length) int64."""


@dataclass(frozen=True)
class Recorded:
    """A batch with the dense model's own answers after the prompts.

    Attributes:
        batch: Inputs and answer mask, in host memory or a file.
        answers: The answers' token ids per pair, end token included.
        log_probs: (answer tokens of the batch, vocabulary) float32 of the dense model, likewise.
    """

    batch: Batch
    answers: list[list[int]]
    log_probs: torch.Tensor

    def waiting(self, room: Room) -> Recorded:
        """This batch with its tensors in a room."""
        inputs = {name: room.put(each) for name, each in self.batch.inputs.items()}
        assert self.batch.answer_mask is not None, "a record holds the dense model's answers"
        batch = replace(self.batch, inputs=inputs, answer_mask=room.put(self.batch.answer_mask))
        return Recorded(batch, self.answers, room.put(self.log_probs))


@dataclass(frozen=True)
class PairFidelity:
    """Closeness to the dense model along its answer to one pair.

    Attributes:
        kl: Sum of ``KL(dense || pruned)`` over the answer's tokens, in nats.
        agreed: Tokens with the same most likely prediction.
        tokens: Tokens of the answer, end token included.
    """

    kl: float
    agreed: int
    tokens: int


@dataclass(frozen=True)
class Fidelity:
    """Closeness to the dense model.

    Attributes:
        by_pair: One entry per pair, in their order.
    """

    by_pair: tuple[PairFidelity, ...]

    @property
    def kl(self) -> float:
        """Mean ``KL(dense || pruned)`` per answer token, in nats."""
        return sum(each.kl for each in self.by_pair) / self.tokens

    @property
    def agreement(self) -> float:
        """Share of answer tokens with the same most likely prediction."""
        return self.agreed / self.tokens

    @property
    def agreed(self) -> int:
        """Answer tokens with the same most likely prediction."""
        return sum(each.agreed for each in self.by_pair)

    @property
    def tokens(self) -> int:
        """Answer tokens compared."""
        return sum(each.tokens for each in self.by_pair)

    @property
    def whole_answers(self) -> int:
        """Pairs with the same most likely prediction at every answer token: a greedy decode of the
        pruned model gives the dense model's answer, end included."""
        return sum(each.agreed == each.tokens for each in self.by_pair)

    def split(self, kinds: Sequence[str]) -> dict[str, Fidelity]:
        """Closeness per kind, in the order of their names; one kind per pair."""
        found: dict[str, list[PairFidelity]] = {name: [] for name in sorted(set(kinds))}
        for name, each in zip(kinds, self.by_pair, strict=True):
            found[name].append(each)
        return {name: Fidelity(tuple(pairs)) for name, pairs in found.items()}


def worst_kind(by_kind: Mapping[str, Fidelity]) -> str:
    """The kind with the largest KL; of equals, the first by name.

    Kinds of fewer than ``MIN_GROUP`` pairs do not count, unless all are as small.
    """
    large = {name: each for name, each in by_kind.items() if len(each.by_pair) >= MIN_GROUP}
    return max(sorted(large or by_kind), key=lambda name: by_kind[name].kl)


def kinds_of_records(records: Sequence[Recorded]) -> list[str]:
    """The kind of each recorded pair, in order (see ``kinds_of``)."""
    told = [[replace(pair, images=(), videos=()) for pair in each.batch.pairs] for each in records]
    pairs = [pair for each in gathered(told) for pair in each]
    return kinds_of(pairs, [len(ids) - 1 for ids in answers_of(records)])


def answers_of(records: Sequence[Recorded]) -> list[list[int]]:
    """The dense model's answers to all recorded pairs, in order."""
    return [ids for each in gathered([record.answers for record in records]) for ids in each]


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: tuple[Pair, ...], max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers as token ids, up to and including the end token."""
    batch = encode_for(model, processor, pairs)
    length = batch.inputs["input_ids"].shape[1]
    output = cast(Generate, model.generate)(
        **batch.inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        suppress_tokens=list(family_of(model.config).token_ids(model.config)),  # not an answer
    )
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}
    answers = []
    for row in output[:, length:].tolist():
        end = next((place + 1 for place, each in enumerate(row) if each in stops), len(row))
        answers.append(row[:end])
    return answers


@torch.no_grad()
def answer_log_probs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Log-probabilities that a model assigns to the vocabulary at the answers' tokens.

    Args:
        model: Dense, or inside a ``pruned`` or ``baseline`` block.
        batch: A batch with an answer mask, wherever its tensors are.

    Returns:
        (answer tokens of the batch, vocabulary) float32, row by row.

    Raises:
        ModelError: They are not finite; names the weight that is not, if there is one.
    """
    batch = batch.to(device_of(model))
    mask = batch.answer_mask
    assert mask is not None, "the batch holds no answers"
    with teacher_forced(mask):
        hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    # The token at position p is predicted from position p - 1.
    chosen = hidden[:, :-1][mask[:, 1:].to(hidden.device)]
    log_probs = model.get_output_embeddings()(chosen).float().log_softmax(dim=-1)
    if not is_finite(log_probs):
        check_weights(named_weights(model), model.name_or_path or type(model).__name__)
        raise ModelError(
            f"{batch.pairs[0].where}: the model's predictions for this batch are not finite.",
            remedy="Its activations overflow the dtype: try --dtype bfloat16 or float32.",
        )
    return log_probs


def record_dense(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Iterable[Pair],
    *,
    batch_size: int,
    max_new_tokens: int,
    label: str = "dense answers",
    total: int | None = None,
    work: Work | None = None,
    name: str = "answers",
    room: Room | None = None,
) -> list[Recorded]:
    """Record the dense model's answers and predictions, and leave none of them on its device.

    Args:
        model: The dense model.
        processor: Its processor.
        pairs: The pairs to answer.
        batch_size: Pairs per forward.
        max_new_tokens: Longest answer.
        label: What is being done, for the progress bar.
        total: Expected number of pairs, likewise.
        work: Keeps finished batches.
        name: Of these pairs, among other stages.
        room: Where batches and predictions wait; None: in host memory.

    Returns:
        The batches of this process (see ``yopo.support.ranks``): all, if there is one.

    Raises:
        DataError: No pairs.
    """
    kept, place = work or NoWork(), InHostMemory() if room is None else room

    def record(_: int, numbered: tuple[int, tuple[Pair, ...]]) -> Recorded:
        number, group = numbered
        found = _record(model, processor, group, max_new_tokens, kept, f"{name}-{number:05}")
        return found.waiting(place)

    groups = track(batches(by_size(pairs), batch_size), label=label, total=total, unit="pairs")
    finished = in_turns(model, record, mine(groups), new_tokens=max_new_tokens)
    records = [each for some in finished for each in some.results]
    if not any(gathered([bool(records)])):
        raise DataError("There are no pairs to evaluate on.")
    return records


def _record(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    group: tuple[Pair, ...],
    max_new_tokens: int,
    work: Work,
    stage: str,
) -> Recorded:
    """Record a batch, or take it from ``work``, which keeps it under ``stage``."""
    kept = work.load(stage)
    if kept is not None:
        answers = kept.about["answers"]
        batch = encode_for(model, processor, group, answers)
        return Recorded(batch, answers, kept.tensors["log_probs"])
    answers = generate_answers(model, processor, group, max_new_tokens)
    batch = encode_for(model, processor, group, answers)
    log_probs = answer_log_probs(model, batch).cpu()
    work.save(stage, Stage({"log_probs": log_probs}, {"answers": answers}))
    return Recorded(batch, answers, log_probs)


def compare(model: PreTrainedModel, records: list[Recorded]) -> Fidelity:
    """Compare a model inside a ``pruned`` or ``baseline`` block with the recorded dense one.

    Args:
        model: The model.
        records: What :func:`record_dense` returned; all processes compare their own.
    """

    def judge(_: int, record: Recorded) -> list[PairFidelity]:
        return _fidelity_of(record, answer_log_probs(model, record.batch).cpu())

    found = [each for some in in_turns(model, judge, records) for each in some.results]
    return Fidelity(tuple(pair for each in gathered(found) for pair in each))


def _fidelity_of(record: Recorded, ours: torch.Tensor) -> list[PairFidelity]:
    """Closeness of (answer tokens of the batch, vocabulary) log-probabilities, pair by pair."""
    dense = record.log_probs
    kl = (dense.exp() * (dense - ours)).sum(dim=-1, dtype=torch.float64)
    agreed = dense.argmax(dim=-1) == ours.argmax(dim=-1)
    assert record.batch.answer_mask is not None, "a record holds the dense model's answers"
    tokens = record.batch.answer_mask.sum(dim=1).tolist()
    parts = zip(kl.split(tokens), agreed.split(tokens), tokens, strict=True)
    return [PairFidelity(float(a.sum()), int(b.sum()), count) for a, b, count in parts]
