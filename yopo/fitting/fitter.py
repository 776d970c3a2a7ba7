"""Everything in planning that needs the model itself: its profile, and fitted weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from transformers import PreTrainedModel

from yopo.data.prompts import Batch
from yopo.fitting.profile import Profile, profile
from yopo.fitting.refit import refit
from yopo.models.family import shape_of
from yopo.plans.schema import PruningPlan
from yopo.support.errors import YopoError


class Fitter:
    """Profiles a dense model and fits plans to it.

    Args:
        model: A dense model in memory.
        encode: Encodes the calibration prompts; called once, when they are first needed.
    """

    def __init__(self, model: PreTrainedModel, encode: Callable[[], Sequence[Batch]]):
        self._model, self._encode = model, encode

    @cached_property
    def _batches(self) -> Sequence[Batch]:
        return self._encode()

    @cached_property
    def profile(self) -> Profile:
        """The dense model's profile, from one walk through its layers.

        Raises:
            DataError: No pair holds an image.
            YopoError: Out of memory; says how to need less.
        """
        with self._in_memory():
            return profile(self._model, self._batches, shape_of(self._model.config))

    def fit(self, plan: PruningPlan) -> PruningPlan:
        """The plan with the weights that its ``compensation: refit`` needs."""
        with self._in_memory():
            fitted = refit(self._model, self._batches, plan)
        return replace(plan, tensors=replace(plan.tensors, refit=fitted))

    @contextmanager
    def _in_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            pairs = sum(len(batch) for batch in self._batches)
            raise YopoError(
                f"Out of memory: the states of {pairs} pairs are in memory while weights are "
                "fitted.",
                remedy="Use fewer --fit-pairs, --dtype bfloat16, or --compensation none.",
            ) from error
