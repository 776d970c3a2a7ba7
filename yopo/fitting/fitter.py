"""Everything in planning that needs the model itself: its profile, and fitted weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from transformers import PreTrainedModel

from yopo.data.prompts import Batch
from yopo.fitting.layerwise import DenseBatch, enter
from yopo.fitting.profile import Profile, profile
from yopo.fitting.refit import refit
from yopo.models.family import shape_of
from yopo.plans.schema import PruningPlan
from yopo.reduction.method import Method
from yopo.support.errors import YopoError

TOGETHER = 4
"""Plans fitted in one walk: each has the states of all pairs in memory."""


class Fitter:
    """Profiles a dense model and fits plans to it.

    Args:
        model: A dense model in memory.
        encode: Encodes the calibration prompts; called once, when they are first needed.
        reduction: Drops visual tokens before the first layer; plans are fitted to what the dense
            model computes for the others.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encode: Callable[[], Sequence[Batch]],
        reduction: Method | None = None,
    ):
        self._model, self._encode, self._pairs = model, encode, 0
        self.reduction = reduction

    @cached_property
    def _batches(self) -> list[DenseBatch]:
        """The prompts at the decoder: the vision tower sees them once for all walks."""
        encoded = self._encode()
        self._pairs = sum(len(batch) for batch in encoded)
        return enter(self._model, encoded, self.reduction)

    @cached_property
    def profile(self) -> Profile:
        """The dense model's profile, from one walk through its layers.

        Raises:
            DataError: No pair holds an image.
            YopoError: Out of memory; says how to need less.
        """
        with self._in_memory():
            return profile(self._model, self._batches, shape_of(self._model.config))

    def fit(self, plans: Sequence[PruningPlan]) -> list[PruningPlan]:
        """The plans with the weights that their ``compensation: refit`` needs.

        They share dense walks, ``TOGETHER`` plans in each; see ``refit`` for what they must share.
        """
        done: list[PruningPlan] = []
        for first in range(0, len(plans), TOGETHER):
            some = plans[first : first + TOGETHER]
            with self._in_memory():
                fitted = refit(self._model, self._batches, some)
            done += [
                replace(plan, tensors=replace(plan.tensors, refit=weights))
                for plan, weights in zip(some, fitted, strict=True)
            ]
        return done

    @contextmanager
    def _in_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise YopoError(
                f"Out of memory: the states of {self._pairs} pairs are in memory during the fit.",
                remedy="Use fewer --fit-pairs, --dtype bfloat16, or --compensation none.",
            ) from error
