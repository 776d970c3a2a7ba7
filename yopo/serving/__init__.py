"""Models from disk or hub: dense ones to measure, pruned ones to serve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yopo.serving.loading import (
        PrunedForConditionalGeneration as PrunedForConditionalGeneration,
    )
    from yopo.serving.loading import PrunedModel as PrunedModel

_REMOTE_CODE = ("PrunedForConditionalGeneration", "PrunedModel")
"""Names that the loader code of baked checkpoints imports from here."""


def __getattr__(name: str) -> object:
    if name not in _REMOTE_CODE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module("yopo.serving.loading"), name)
