"""Everything in planning that needs the model itself: its profile, and fitted weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from operator import itemgetter

from transformers import PreTrainedModel

from yopo.data.prompts import Batch
from yopo.fitting.layerwise import DenseBatch, enter
from yopo.fitting.profile import Profile, profile
from yopo.fitting.refit import refit, stage_of
from yopo.fitting.states import InFiles, Room
from yopo.models.family import shape_of
from yopo.models.offloaded import offload_option
from yopo.plans.schema import PruningPlan
from yopo.plans.tensors import refit_sizes
from yopo.reduction.method import Method
from yopo.support.out_of_memory import memory_for, narrower
from yopo.support.work_dir import NoWork, Stage, Work

TOGETHER = 4
"""Plans fitted in one walk: each has the states of all pairs in memory."""

_PROFILE = "profile"


class Fitter:
    """Profiles a dense model and fits plans to it.

    Args:
        model: A dense model in memory.
        encode: Encodes the calibration prompts; called once, when they are first needed.
        reduction: Drops visual tokens before the first layer; plans are fitted to what the dense
            model computes for the others.
        work: Keeps finished layers of the profile and of fits.
        is_known: Whether a plan has been judged in former runs, so that its weights are needed
            only if it is the best.
        room: Where the states of pairs wait; None: on the decoder's device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encode: Callable[[], Iterable[Batch]],
        reduction: Method | None = None,
        work: Work | None = None,
        is_known: Callable[[PruningPlan], bool] = lambda plan: False,
        room: Room | None = None,
    ):
        self._model, self._encode, self._pairs = model, encode, 0
        self.reduction = reduction
        self._work = work or NoWork()
        self._is_known, self._room = is_known, room
        self._judged: list[tuple[float, list[str]]] = []

    @cached_property
    def _batches(self) -> list[DenseBatch]:
        """The prompts at the decoder: the vision tower sees them once for all walks."""
        with self._in_memory("running prompts up to the first layer"):
            return enter(self._model, self._counted(), self.reduction, self._room)

    def _counted(self) -> Iterator[Batch]:
        self._pairs = 0
        for batch in self._encode():
            self._pairs += len(batch)
            yield batch

    @cached_property
    def profile(self) -> Profile:
        """The dense model's profile, from one walk through its layers.

        Raises:
            DataError: No pair holds an image.
            YopoError: Out of memory; says how to need less.
        """
        kept = self._work.load(_PROFILE)
        if kept is not None:
            return Profile(**kept.tensors)
        batches = self._batches
        with self._in_memory("the profile"):
            found = profile(self._model, batches, shape_of(self._model.config), self._work)
        self._work.save(_PROFILE, Stage(vars(found)))
        return found

    def fit(self, plans: Sequence[PruningPlan]) -> list[PruningPlan]:
        """The plans with the weights that their ``compensation: refit`` needs.

        They share dense walks, ``TOGETHER`` plans in each; see ``refit`` for what they must share.
        Plans whose quality is known from before stay without weights (see :meth:`complete`).
        """
        self.tidy(plans)
        known = [self._is_known(plan) for plan in plans]
        pairs = list(zip(plans, known, strict=True))
        new = iter(self._fit([plan for plan, is_known in pairs if not is_known]))
        return [plan if is_known else next(new) for plan, is_known in pairs]

    def complete(self, plan: PruningPlan) -> PruningPlan:
        """The plan with its weights, if it has been left without those that it needs."""
        fitted = _fitted_layers(plan)
        if not fitted or plan.tensors.refit:
            return plan
        kept = {number: self._work.load(stage_of(plan, number)) for number in fitted}
        weights = {number: each.tensors for number, each in kept.items() if each is not None}
        if len(weights) < len(kept):
            return self._fit([plan])[0]
        return replace(plan, tensors=replace(plan.tensors, refit=weights))

    def judged(self, plan: PruningPlan, kl: float) -> None:
        """Say how good a plan is: of all that are judged, only the best one's layers are kept."""
        names = [stage_of(plan, number) for number in _fitted_layers(plan)]
        if names:
            self._judged.append((kl, names))

    def tidy(self, plans: Sequence[PruningPlan] = ()) -> None:
        """Forget the fitted layers of judged plans, except of the best one and of ``plans``."""
        self._judged.sort(key=itemgetter(0))
        needed = {name for _, names in self._judged[:1] for name in names}
        needed |= {stage_of(plan, number) for plan in plans for number in _fitted_layers(plan)}
        for _, names in self._judged[1:]:
            for name in names:
                if name not in needed:
                    self._work.drop(name)
        del self._judged[1:]

    def _fit(self, plans: Sequence[PruningPlan]) -> list[PruningPlan]:
        done: list[PruningPlan] = []
        for first in range(0, len(plans), TOGETHER):
            some = plans[first : first + TOGETHER]
            batches = self._batches
            with self._in_memory("the fit"):
                fitted = refit(self._model, batches, some, self._work)
            done += [
                replace(plan, tensors=replace(plan.tensors, refit=weights))
                for plan, weights in zip(some, fitted, strict=True)
            ]
        return done

    def _in_memory(self, work: str) -> AbstractContextManager[None]:
        """What to do where the states of all pairs, or a layer's moments, do not fit."""
        offload, folder = offload_option(self._model), None
        if offload is not None:
            offload += " (with --work-dir, if host memory is full)"
        elif not isinstance(self._room, InFiles):
            folder = "--work-dir"
        states = f", with the states of {self._pairs} pairs" if self._pairs else ""
        return memory_for(
            f"{work}{states}",
            offload,
            folder,
            "fewer --fit-pairs",
            narrower(self._model.dtype.itemsize),
            "--compensation none",
        )


def _fitted_layers(plan: PruningPlan) -> list[int]:
    """Numbers of the layers that have fitted weights."""
    if plan.compensation != "refit":
        return []
    shape, depth = plan.model.shape, plan.visual_depth
    return [number for number in range(depth) if refit_sizes(plan.layers[number], shape)]
