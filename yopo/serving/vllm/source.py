"""The plan that vLLM is to serve: from the checkpoint it loads, unless the caller wants none."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any

from yopo.checkpoint.reader import fetch_some
from yopo.checkpoint.sidecar_files import PLAN_FILES
from yopo.models.registry import resolve
from yopo.plans.file import read_document
from yopo.plans.schema import PruningPlan
from yopo.plans.servable import engine_problem
from yopo.serving.loading import open_baked, plan_file
from yopo.support.errors import CheckpointError, ModelError, PlanError

SWITCH = "YOPO_BUDGET"
"""Environment variable: ``dense``, or the visual budget of one of the baked plans."""

_DENSE = ("dense", "off", "none", "")


def wanted_budget(hf_config: Any) -> tuple[bool, float | None]:
    """Whether to prune, and within which visual budget (None: the checkpoint's first plan).

    Args:
        hf_config: The checkpoint's configuration; ``--hf-overrides '{"yopo": "dense"}'`` (or null,
            or a budget) replaces its key. The environment variable takes precedence.

    Raises:
        CheckpointError: The switch is neither ``dense`` nor a number.
    """
    key = getattr(hf_config, "yopo", None)
    if key is None:
        return False, None
    switch = os.environ.get(SWITCH)
    wanted: Any = switch if switch is not None else key
    if isinstance(wanted, dict):  # as baked
        wanted = wanted.get("budget")
        return True, None if wanted is None else _number(wanted)
    if wanted is False or (isinstance(wanted, str) and wanted.strip().lower() in _DENSE):
        return False, None
    return True, _number(wanted)


def _number(value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 < found < math.inf:
        raise CheckpointError(
            f"{SWITCH} or the override of 'yopo' is {value!r}, expected 'dense' or a visual budget "
            "such as 0.12."
        )
    return found


def plan_to_serve(model_config: Any) -> PruningPlan | None:
    """The plan of the checkpoint that vLLM loads, without its tensors; None to serve it dense.

    Args:
        model_config: vLLM's ``ModelConfig``.

    Raises:
        CheckpointError: The checkpoint has no plan within the wanted budget.
        PlanError: Its plan cannot be served.
    """
    is_pruned, budget = wanted_budget(model_config.hf_config)
    return _plan(model_config.model, model_config.revision, budget) if is_pruned else None


@lru_cache(maxsize=4)
def _plan(name: str, revision: str | None, budget: float | None) -> PruningPlan:
    source = resolve(f"{name}@{revision}" if revision and "@" not in name else name)
    folder = fetch_some(source, ("config.json", PLAN_FILES))
    plan, _ = read_document(plan_file(folder, budget))
    refuse_unservable(plan, name)
    return plan


def refuse_unservable(plan: PruningPlan, name: str) -> None:
    """Raise a PlanError if vLLM cannot run a plan."""
    problem = engine_problem(plan)
    if problem is not None:
        raise PlanError(
            f"{name}: its plan cannot be served in vLLM: {problem}.",
            remedy="Make one that can with `yopo calibrate --engine vllm`, or serve the dense "
            f"model: {SWITCH}=dense.",
        )


def refuse_settings(vllm_config: Any) -> None:
    """Raise a ModelError for settings of vLLM under which rows cannot be split."""
    parallel = vllm_config.parallel_config
    found = None
    if vllm_config.quant_config is not None:
        found = "quantized weights"
    elif vllm_config.lora_config is not None:
        found = "LoRA adapters"
    elif parallel.pipeline_parallel_size > 1:
        found = "pipeline parallelism"
    elif getattr(parallel, "enable_dbo", False):
        found = "dual batch overlap"
    if found is not None:
        raise ModelError(
            f"A pruned model cannot be served with {found}.",
            remedy=f"Serve it without, or serve the dense model: {SWITCH}=dense.",
        )


def plan_with_tensors(model_config: Any) -> PruningPlan:
    """The plan to serve with its tensors, checked against the weights it was baked into.

    Raises:
        CheckpointError, ModelError, PlanError: As for ``yopo.load``.
    """
    _, budget = wanted_budget(model_config.hf_config)
    return open_baked(model_config.model, budget, revision=model_config.revision).plan
