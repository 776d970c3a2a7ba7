"""The entry point: what lmms-eval learns about our model class before it needs it."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Name the model class, without importing it, as lmms-eval is still being imported itself."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="yopo", chat_class_path="yopo.serving.lmms_eval.model.PrunedForEvaluation"
    )
