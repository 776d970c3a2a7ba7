"""yopo: you only prune once - static, modality-aware pruning of multimodal LLMs.

    import yopo
    model = yopo.load("llava-1.5-7b-yopo")       # a baked checkpoint that skips the pruned work
    with yopo.pruned(model, plan):               # or a model in memory, for a while
        model.generate(**inputs)
    yopo.is_pruned(model), yopo.plan_of(model)   # at which budget: plan_of(model).budget.reached

Importing this package imports neither torch nor transformers; the first use of ``load`` does.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "yopo.serving.loading",
    "pruned": "yopo.runtime.install",
    "is_pruned": "yopo.runtime.introspect",
    "plan_of": "yopo.runtime.introspect",
    "fitted_parameters": "yopo.runtime.install",
    "PruningPlan": "yopo.plans.schema",
    "LayerPlan": "yopo.plans.schema",
    "read_plan": "yopo.plans.storage",
    "YopoError": "yopo.support.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'yopo' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
