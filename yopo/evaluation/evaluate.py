"""Evaluation of a plan: the dense and the pruned model on the same pairs, in one process.

A plan is measured like any other change of the model: ``measure_kept`` takes the context manager
that makes the change, ``pruned`` or a baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.pairs import Pair
from yopo.evaluation.accuracy import is_correct
from yopo.evaluation.examples import Answered, Example, choose, examples_of
from yopo.evaluation.fidelity import (
    Fidelity,
    Recorded,
    compare,
    generate_answers,
    kinds_of_records,
    record_dense,
    worst_kind,
)
from yopo.evaluation.timing import PrefillTime, Switch, time_prefill
from yopo.models.offloaded import is_offloaded, less_memory
from yopo.models.turns import in_turns
from yopo.plans.evaluated import FORMAT_VERSION
from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_kv_bytes,
    prefill_flops,
    visual_budget,
    visual_kv_bytes,
)
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned
from yopo.support.binomial import interval
from yopo.support.console import note, track
from yopo.support.out_of_memory import memory_for


@dataclass(frozen=True)
class Accuracy:
    """Right answers among the pairs that have an accepted answer."""

    dense: int
    pruned: int
    total: int


@dataclass(frozen=True)
class Part:
    """How much of the dense model's quality is kept on some pairs.

    Attributes:
        accuracy: Counts over the pairs with answers; None if none has any.
        same_answers: Pairs whose generated answers are identical.
        fidelity: Agreement and KL along the dense model's answers.
    """

    accuracy: Accuracy | None
    same_answers: int
    fidelity: Fidelity

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.fidelity.by_pair)

    def to_dict(self) -> dict[str, Any]:
        """All results as plain values, for JSON."""
        lower, upper = interval(self.same_answers, self.pairs)
        return {
            "pairs": self.pairs,
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "same_answers": self.same_answers,
            "same_answers_interval": [round(lower, 6), round(upper, 6)],
            "whole_answers": self.fidelity.whole_answers,
            "agreement": self.fidelity.agreement,
            "kl": self.fidelity.kl,
            "answer_tokens": self.fidelity.tokens,
        }


@dataclass(frozen=True)
class Kept(Part):
    """How much of the dense model's quality is kept, over all pairs and per kind.

    Attributes:
        by_kind: The parts by kind of pair (see ``kinds_of``), in the order of their names.
        answers: What both models answered to each pair.
    """

    by_kind: dict[str, Part]
    answers: tuple[Answered, ...] = ()

    @property
    def worst_kind(self) -> str:
        """The kind with the largest KL (see ``fidelity.worst_kind``)."""
        return worst_kind({name: part.fidelity for name, part in self.by_kind.items()})

    def to_dict(self) -> dict[str, Any]:
        """The kinds as well."""
        kinds = {name: part.to_dict() for name, part in self.by_kind.items()}
        return super().to_dict() | {"by_kind": kinds, "worst_kind": self.worst_kind}


@dataclass(frozen=True)
class Evaluation:
    """The quality that a plan keeps and the time that it saves.

    Attributes:
        plan: The evaluated plan.
        kept: Accuracy, agreement and KL, over all pairs and per kind.
        prefill: Decoder prefill time; None if not timed.
        examples: Some pairs with their images, both answers, and where the text looks.
    """

    plan: PruningPlan
    kept: Kept
    prefill: PrefillTime | None
    examples: tuple[Example, ...] = ()

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return self.kept.pairs

    @property
    def accuracy(self) -> Accuracy | None:
        """Counts over all pairs with answers; None if none has any."""
        return self.kept.accuracy

    @property
    def by_kind(self) -> dict[str, Part]:
        """What is kept of each kind of pair."""
        return self.kept.by_kind

    @property
    def same_answers(self) -> int:
        """Pairs whose generated answers are identical."""
        return self.kept.same_answers

    @property
    def fidelity(self) -> Fidelity:
        """Agreement and KL along the dense model's answers."""
        return self.kept.fidelity

    def to_dict(self) -> dict[str, Any]:
        """All results as plain values, for JSON."""
        plan, shape = self.plan, self.plan.model.shape
        dense_flops = dense_prefill_flops(shape, plan.workload)
        return {
            "yopo_evaluation": FORMAT_VERSION,
            "model": plan.model.name,
            "visual_budget": visual_budget(plan),
            "prefill_flops_ratio": prefill_flops(plan) / dense_flops,
            "visual_kv_bytes": {
                "dense": dense_visual_kv_bytes(shape, plan.workload),
                "pruned": visual_kv_bytes(plan),
            },
            **self.kept.to_dict(),
            "prefill": None if self.prefill is None else asdict(self.prefill),
            "examples": [asdict(each) for each in self.examples],
        }


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    plan: PruningPlan,
    pairs: Iterable[Pair],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    timing_runs: int = 15,
    total: int | None = None,
    records: list[Recorded] | None = None,
    examples: int = 0,
) -> Evaluation:
    """Evaluate a plan on pairs.

    Args:
        model: The dense model in memory (a baked checkpoint's, for its baked plan).
        processor: Its processor.
        plan: The plan to evaluate.
        pairs: Held-out pairs, with answers for accuracy.
        batch_size: Pairs per forward.
        max_new_tokens: Longest answer.
        timing_runs: Paired prefill runs; 0 skips timing, as do weights that are not in memory.
        total: Number of pairs, for the progress bar.
        records: The dense model's answers, if already recorded for another plan.
        examples: Pairs to show with their images and where the text looks (see ``examples_of``).

    Raises:
        DataError: No pairs.
        ModelError: The plan was made for another model.
        YopoError: Out of memory; says what needs less.
    """
    ways = *less_memory(model, batch_size), "--device-map auto"
    each = f"{batch_size} pairs per batch"
    if records is None:
        less = "fewer --max-new-tokens", "fewer --samples"
        with memory_for(f"recording the dense model's answers, {each}", *ways, *less):
            records = record_dense(
                model,
                processor,
                pairs,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                total=total,
            )
    with memory_for(f"comparing the pruned model with the dense one, {each}", *ways):
        kept = measure_kept(
            model,
            processor,
            records,
            lambda: pruned(model, plan),
            max_new_tokens=max_new_tokens,
        )
    prefill = None
    if timing_runs and is_offloaded(model.get_decoder()):
        note("Prefill is not timed, since that would be the time to fetch weights.")
    elif timing_runs:
        largest = max((record.batch for record in records), key=len)
        with memory_for(f"timing prefills, {each}", *ways, "--timing-runs 0"):
            prefill = time_prefill(
                model, largest, lambda: pruned(model, plan, check=False), runs=timing_runs
            )
    with memory_for("looking where the text looks, one pair at a time", *ways[1:], "--examples 0"):
        shown = examples_of(model, processor, plan, choose(kept.answers, examples))
    return Evaluation(plan, kept, prefill, shown)


def measure_kept(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: list[Recorded],
    switch: Callable[[], Switch],
    *,
    max_new_tokens: int = 32,
    label: str = "pruned answers",
) -> Kept:
    """Measure a changed model against the recorded dense one.

    Args:
        model: The dense model in memory.
        processor: Its processor.
        records: The dense model's answers, from ``record_dense``.
        switch: Makes the context manager that changes the model (``pruned``, ``baseline``).
        max_new_tokens: Longest answer.
        label: Label of the progress bar.
    """

    def answer(_: int, record: Recorded) -> list[tuple[Pair, str, str]]:
        group = record.batch.pairs
        ours = generate_answers(model, processor, group, max_new_tokens)
        dense, pruned = (
            processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for ids in (record.answers, ours)
        )
        return list(zip(group, dense, pruned, strict=True))

    with switch():
        fidelity = compare(model, records)
        groups = (record for record in records)  # without a size: batches are counted
        tracked = track(groups, label=label, total=len(records), unit="batches")
        finished = in_turns(model, answer, tracked, new_tokens=max_new_tokens)
        seen = [each for some in finished for batch in some.results for each in batch]
    kinds = kinds_of_records(records)
    parts = {
        name: _part([each for each, kind in zip(seen, kinds, strict=True) if kind == name], some)
        for name, some in fidelity.split(kinds).items()
    }
    each = zip(seen, kinds, fidelity.by_pair, strict=True)
    answers = tuple(
        Answered(pair, kind, dense, ours, found) for (pair, dense, ours), kind, found in each
    )
    return Kept(**vars(_part(seen, fidelity)), by_kind=parts, answers=answers)


def _part(seen: Sequence[tuple[Pair, str, str]], fidelity: Fidelity) -> Part:
    """Count over (pair, dense answer, pruned answer)."""
    asked = [each for each in seen if each[0].answers]
    accuracy = Accuracy(
        dense=sum(is_correct(dense, pair.answers) for pair, dense, _ in asked),
        pruned=sum(is_correct(ours, pair.answers) for pair, _, ours in asked),
        total=len(asked),
    )
    same = sum(dense == ours for _, dense, ours in seen)
    return Part(accuracy if asked else None, same, fidelity)
