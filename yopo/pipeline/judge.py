"""How close plans are to the dense model, on pairs that nothing is fitted on."""

from __future__ import annotations

from functools import cached_property

from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.pairs import Pairs
from yopo.data.split import Split, pick
from yopo.evaluation.fidelity import Fidelity, Recorded, compare, record_dense
from yopo.fitting.states import OnDevice, Room
from yopo.models.offloaded import less_memory
from yopo.pipeline.options import RunOptions
from yopo.pipeline.work import Judgements
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned
from yopo.support.out_of_memory import memory_for
from yopo.support.work_dir import Work


class Judge:
    """Compares plans with the dense model, whose answers are recorded once.

    Args:
        model: The dense model.
        processor: Its processor.
        pairs: Those of the calibration.
        split: The purpose of each.
        options: How the model is run.
        work: Keeps answers and judgements.
        room: Where states wait; answers wait there, too, unless it is the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        pairs: Pairs,
        split: Split,
        options: RunOptions,
        work: Work,
        room: Room,
    ):
        self._model, self._processor, self._options = model, processor, options
        self._pairs, self._split, self._work = pairs, split, work
        self._kept, self._size = Judgements(work), options.batch_size
        self._room = None if isinstance(room, OnDevice) else room

    def has_judged(self, plan: PruningPlan) -> bool:
        """Whether a plan has been compared, in this run or a former one."""
        return self._kept.get(plan, "comparison") is not None

    def compare(self, plan: PruningPlan, pairs: str) -> Fidelity:
        """How close a plan is on the ``comparison`` or the ``holdout`` pairs.

        Raises:
            YopoError: Out of memory; says what needs less.
        """
        found = self._kept.get(plan, pairs)
        if found is None:
            records = self.comparison if pairs == "comparison" else self.holdout
            about = f"comparing a plan with the dense model, {self._size} pairs per batch"
            ways = less_memory(self._model, self._size)
            with memory_for(about, *ways), pruned(self._model, plan, check=False):
                found = compare(self._model, records)
            self._kept.add(plan, pairs, found)
        return found

    @cached_property
    def comparison(self) -> list[Recorded]:
        """The dense model's answers to the pairs that plans are compared on."""
        return self._record(self._split.comparison, "answers-comparison", "fewer --measure-pairs")

    @cached_property
    def holdout(self) -> list[Recorded]:
        """Its answers to those that a tolerance is shown on."""
        return self._record(self._split.holdout, "answers-holdout", "fewer --samples")

    def _record(self, numbers: frozenset[int], name: str, fewer: str) -> list[Recorded]:
        work = (
            f"recording the dense model's answers to {len(numbers)} pairs, {self._size} per batch"
        )
        ways = less_memory(self._model, self._size)
        with memory_for(work, *ways, "fewer --max-new-tokens", fewer):
            return record_dense(
                self._model,
                self._processor,
                pick(self._pairs, numbers),
                batch_size=self._size,
                max_new_tokens=self._options.max_new_tokens,
                total=len(numbers),
                work=self._work.own,
                name=name,
                room=self._room,
            )
