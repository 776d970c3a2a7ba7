"""yopo: you only prune once - static, modality-aware pruning of multimodal LLMs.

    import yopo

    calibrated = yopo.calibrate("llava-1.5-7b", 0.25)   # or a model in memory, with its processor
    yopo.write_plan(calibrated.plan, "plan.yaml")
    yopo.apply("plan.yaml", output="llava-1.5-7b-yopo")
    model = yopo.load("llava-1.5-7b-yopo")              # skips the pruned work
    with yopo.pruned(model_in_memory, calibrated.plan):
        ...                                             # or prune a model in memory temporarily

Each function does what the command of the same name does. Importing this package imports neither
torch nor transformers; the first use of a function does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from yopo.support.version import __version__ as __version__

if TYPE_CHECKING:
    from yopo.pipeline.commands import apply as apply
    from yopo.pipeline.commands import calibrate as calibrate
    from yopo.pipeline.commands import evaluate as evaluate
    from yopo.pipeline.commands import plan as plan
    from yopo.pipeline.options import FitOptions as FitOptions
    from yopo.pipeline.options import RunOptions as RunOptions
    from yopo.planning.request import BudgetRequest as BudgetRequest
    from yopo.planning.request import LatencyRequest as LatencyRequest
    from yopo.planning.request import PaperRequest as PaperRequest
    from yopo.planning.request import ToleranceRequest as ToleranceRequest
    from yopo.plans.layer_plan import LayerPlan as LayerPlan
    from yopo.plans.schema import PruningPlan as PruningPlan
    from yopo.plans.storage import read_plan as read_plan
    from yopo.plans.storage import write_plan as write_plan
    from yopo.report.describe import describe as describe
    from yopo.runtime.install import fitted_parameters as fitted_parameters
    from yopo.runtime.install import pruned as pruned
    from yopo.runtime.introspect import is_pruned as is_pruned
    from yopo.runtime.introspect import plan_of as plan_of
    from yopo.serving.loading import load as load
    from yopo.support.errors import YopoError as YopoError

_PUBLIC = {
    "calibrate": "yopo.pipeline.commands",
    "plan": "yopo.pipeline.commands",
    "apply": "yopo.pipeline.commands",
    "evaluate": "yopo.pipeline.commands",
    "load": "yopo.serving.loading",
    "pruned": "yopo.runtime.install",
    "is_pruned": "yopo.runtime.introspect",
    "plan_of": "yopo.runtime.introspect",
    "describe": "yopo.report.describe",
    "fitted_parameters": "yopo.runtime.install",
    "read_plan": "yopo.plans.storage",
    "write_plan": "yopo.plans.storage",
    "PruningPlan": "yopo.plans.schema",
    "LayerPlan": "yopo.plans.layer_plan",
    "BudgetRequest": "yopo.planning.request",
    "PaperRequest": "yopo.planning.request",
    "ToleranceRequest": "yopo.planning.request",
    "LatencyRequest": "yopo.planning.request",
    "RunOptions": "yopo.pipeline.options",
    "FitOptions": "yopo.pipeline.options",
    "YopoError": "yopo.support.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'yopo' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
