"""What the cache of a prefill holds of visual tokens, and whether it is what the plan predicts."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from transformers.cache_utils import CacheLayerMixin

from yopo.plans.flops import visual_kv_bytes
from yopo.plans.schema import PruningPlan
from yopo.support.errors import ModelError


@runtime_checkable
class _CountsVisual(Protocol):
    """A cache layer that can tell which of its keys and values are visual."""

    def visual_bytes(self) -> int:
        """Bytes of visual keys and values that the layer holds."""


def visual_bytes(layer: object) -> int:
    """Bytes of visual keys and values in a cache layer of a changed model."""
    assert isinstance(layer, _CountsVisual), "not a cache of a changed model"
    return layer.visual_bytes()


def all_bytes(layer: object) -> int:
    """Bytes of all keys and values in a stock cache layer."""
    assert isinstance(layer, CacheLayerMixin), "not a cache of keys and values"
    assert layer.keys is not None and layer.values is not None, "nothing was prefilled"
    return layer.keys.nbytes + layer.values.nbytes


def refuse_unplanned(held: int, plan: PruningPlan, batch: int, itemsize: int) -> None:
    """Refuse to time a pruned model whose cache shows that it runs something else than its plan.

    Args:
        held: Visual bytes in the cache of a prefill.
        plan: The plan for the prompt that was prefilled.
        batch: Number of equal prompts.
        itemsize: Bytes of a number of the model's dtype.

    Raises:
        ModelError: The plan predicts another number of bytes.
    """
    planned = batch * visual_kv_bytes(plan, itemsize)
    if held != planned:
        raise ModelError(
            f"The pruned model's cache holds {held} bytes of visual keys and values after a "
            f"prefill, where the plan predicts {planned}: images do not reach the decoder as "
            "planned, so nothing was timed.",
            remedy="Use a version of transformers that yopo was tested with (scripts/README.md).",
        )
