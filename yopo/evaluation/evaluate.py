"""Evaluation of a plan: the dense and the pruned model on the same pairs, in one process.

A plan is measured like any other change of the model: ``measure_kept`` takes the context manager
that makes the change, ``pruned`` or a baseline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.pairs import Pair
from yopo.evaluation.accuracy import is_correct
from yopo.evaluation.fidelity import Fidelity, Recorded, compare, generate_answers, record_dense
from yopo.evaluation.timing import PrefillTime, Switch, time_prefill
from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_kv_bytes,
    prefill_flops,
    visual_budget,
    visual_kv_bytes,
)
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned
from yopo.support.console import track


@dataclass(frozen=True)
class Accuracy:
    """Right answers among the pairs that have an accepted answer."""

    dense: int
    pruned: int
    total: int


@dataclass(frozen=True)
class Kept:
    """How much of the dense model's quality is kept; attributes as in :class:`Evaluation`."""

    pairs: int
    accuracy: Accuracy | None
    by_kind: dict[str, Accuracy]
    same_answers: int
    fidelity: Fidelity


@dataclass(frozen=True)
class Evaluation:
    """The quality that a plan keeps and the time that it saves.

    Attributes:
        plan: The evaluated plan.
        pairs: Number of pairs.
        accuracy: Counts over all pairs with answers; None if none has any.
        by_kind: Counts per kind of question, where the data names kinds.
        same_answers: Pairs whose generated answers are identical.
        fidelity: Agreement and KL along the dense model's answers.
        prefill: Decoder prefill time; None if not timed.
    """

    plan: PruningPlan
    pairs: int
    accuracy: Accuracy | None
    by_kind: dict[str, Accuracy]
    same_answers: int
    fidelity: Fidelity
    prefill: PrefillTime | None

    def to_dict(self) -> dict[str, Any]:
        """All results as plain values, for JSON."""
        plan, shape = self.plan, self.plan.model.shape
        dense_flops = dense_prefill_flops(shape, plan.workload)
        return {
            "model": plan.model.name,
            "pairs": self.pairs,
            "visual_budget": visual_budget(plan),
            "prefill_flops_ratio": prefill_flops(plan) / dense_flops,
            "visual_kv_bytes": {
                "dense": dense_visual_kv_bytes(shape, plan.workload),
                "pruned": visual_kv_bytes(plan),
            },
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "by_kind": {kind: asdict(counts) for kind, counts in self.by_kind.items()},
            "same_answers": self.same_answers,
            "agreement": self.fidelity.agreement,
            "kl": self.fidelity.kl,
            "answer_tokens": self.fidelity.tokens,
            "prefill": None if self.prefill is None else asdict(self.prefill),
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
) -> Evaluation:
    """Evaluate a plan on pairs.

    Args:
        model: The dense model in memory (a baked checkpoint's, for its baked plan).
        processor: Its processor.
        plan: The plan to evaluate.
        pairs: Held-out pairs, with answers for accuracy.
        batch_size: Pairs per forward.
        max_new_tokens: Longest answer.
        timing_runs: Paired prefill runs; 0 skips timing.
        total: Number of pairs, for the progress bar.
        records: The dense model's answers, if already recorded for another plan.

    Raises:
        DataError: No pairs.
        ModelError: The plan was made for another model.
    """
    if records is None:
        records = record_dense(
            model,
            processor,
            pairs,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            total=total,
        )
    kept = measure_kept(
        model,
        processor,
        records,
        lambda: pruned(model, plan),
        max_new_tokens=max_new_tokens,
    )
    prefill = None
    if timing_runs:
        largest = max((record.batch for record in records), key=len)
        prefill = time_prefill(
            model, largest, lambda: pruned(model, plan, check=False), runs=timing_runs
        )
    fields = (kept.pairs, kept.accuracy, kept.by_kind, kept.same_answers, kept.fidelity)
    return Evaluation(plan, *fields, prefill)


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
    tokenizer = processor.tokenizer
    seen: list[tuple[Pair, str, str]] = []
    with switch():
        fidelity = compare(model, records)
        groups = (record for record in records)
        for record in track(groups, label=label, total=len(records), unit="batches"):
            group = record.batch.pairs
            ours = generate_answers(model, processor, group, max_new_tokens)
            texts = (
                tokenizer.batch_decode(ids, skip_special_tokens=True)
                for ids in (record.answers, ours)
            )
            seen += zip(group, *texts, strict=True)
    counts, kinds = _count(seen)
    return Kept(len(seen), counts, kinds, sum(dense == ours for _, dense, ours in seen), fidelity)


def _count(
    seen: list[tuple[Pair, str, str]],
) -> tuple[Accuracy | None, dict[str, Accuracy]]:
    overall: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = {}
    for pair, dense, ours in seen:
        if not pair.answers:
            continue
        counters = [overall]
        if pair.kind is not None:
            counters.append(by_kind.setdefault(pair.kind, Counter()))
        for counter in counters:
            counter["total"] += 1
            counter["dense"] += is_correct(dense, pair.answers)
            counter["pruned"] += is_correct(ours, pair.answers)
    kinds = {kind: _accuracy(each) for kind, each in sorted(by_kind.items())}
    return _accuracy(overall) if overall else None, kinds


def _accuracy(counter: Counter[str]) -> Accuracy:
    return Accuracy(counter["dense"], counter["pruned"], counter["total"])
