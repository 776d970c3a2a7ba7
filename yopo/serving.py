"""Models from disk or hub: dense ones to measure, pruned ones to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from yopo.checkpoint.companions import PLAN_FILE, PLAN_FILES
from yopo.checkpoint.complete import Completion
from yopo.checkpoint.reader import fetch
from yopo.errors import CheckpointError, ModelError
from yopo.families.registry import ModelSource, family_of, resolve
from yopo.plan import Plan
from yopo.plan_file import read_plan
from yopo.plan_tensors import PlanTensors, read_tensors
from yopo.runtime.install import install


def load(
    path: str | Path, *, budget: float | None = None, trainable: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a baked checkpoint as a model that skips the pruned work.

    Args:
        path: A directory that ``yopo apply`` wrote.
        budget: Of the plans that were baked together, take the one with the largest visual budget
            that is not above this one; None: the first.
        trainable: Whether the plan's fitted weights are parameters, for recovery training; see
            ``yopo.runtime.saved``.
        **kwargs: Passed to ``from_pretrained`` (``dtype``, ``device_map``, ...).

    Returns:
        A transformers model of the checkpoint's own class; its ``save_pretrained`` and
        ``push_to_hub`` write a checkpoint like this one.

    Raises:
        CheckpointError: Not a baked checkpoint, a tensor is missing, or no plan within the budget.
        ModelError: The weights are not the ones that the plan was baked into.
    """
    plan, tensors = read_baked_plan(path, budget)
    model = load_dense(resolve(str(path)), **kwargs)
    install(model, plan, tensors, trainable=trainable, writer=Completion(Path(path)))
    return model


def read_baked_plan(
    path: str | Path, budget: float | None = None
) -> tuple[Plan, PlanTensors | None]:
    """The plan inside a baked checkpoint (see :func:`load`), and its tensors.

    Raises:
        CheckpointError: The directory holds no plan, or none within the budget.
    """
    file = Path(path) / PLAN_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path}: is not a pruned checkpoint (no {PLAN_FILE}).",
            remedy="Make one with `yopo apply plan.yaml`.",
        )
    plan = read_plan(file)
    if budget is not None:
        plan = _largest_within(budget, Path(path))
    return plan, None if plan.tensors is None else read_tensors(plan, Path(path))


def _largest_within(budget: float, folder: Path) -> Plan:
    plans = [read_plan(file) for file in sorted(folder.glob(PLAN_FILES))]
    within = [plan for plan in plans if plan.budget.reached <= budget + 1e-9]
    if not within:
        known = ", ".join(f"{plan.budget.reached:.3g}" for plan in plans)
        raise CheckpointError(
            f"{folder}: has no plan within a visual budget of {budget}; it has {known}.",
            remedy="Ask for one of these, or bake another plan with the others.",
        )
    return max(within, key=lambda plan: plan.budget.reached)


def load_dense(source: ModelSource, **kwargs: Any) -> PreTrainedModel:
    """Load a model with the stock transformers class, in eval mode.

    Args:
        source: From ``families.registry.resolve``.
        **kwargs: Passed to ``from_pretrained``; ``dtype`` defaults to the checkpoint's.

    Raises:
        ModelError: The model cannot be reached, is of no supported family, or is no model.
        CheckpointError: A weight is missing from the checkpoint (transformers would make one up).
    """
    folder = fetch(source)
    try:
        config = AutoConfig.from_pretrained(folder)
        family_of(config)
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, config=config, output_loading_info=True, **{"dtype": "auto", **kwargs}
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else f"{reason[:297]}..."
        raise ModelError(f"{source.location}: cannot be loaded: {reason}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source.location}: {len(missing)} weights are missing, {missing[0]} among them.",
            remedy="The checkpoint is incomplete or of another architecture.",
        )
    return model.eval()


class PrunedForConditionalGeneration:
    """What a baked checkpoint's remote code resolves to under ``trust_remote_code=True``.

    transformers skips the renaming of checkpoint keys for custom classes, which would leave
    weights random; so the stock class loads them, and the plan is installed behind.
    """

    _auto_class = None

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load the stock model of the checkpoint, install its plan.

        ``budget`` and ``trainable`` as for ``load``.
        """
        plan, tensors = read_baked_plan(path, kwargs.pop("budget", None))
        trainable = kwargs.pop("trainable", False)
        for name in ("trust_remote_code", "code_revision"):
            kwargs.pop(name, None)
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path)
        import transformers

        stock = getattr(transformers, family_of(config).architecture)
        loaded = stock.from_pretrained(path, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        writer = Completion(Path(path))
        install(model.eval(), plan, tensors, trainable=trainable, writer=writer)
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Asked for by transformers; nothing is saved from this class."""


def torch_dtype(name: str) -> torch.dtype | str:
    """A dtype by name; ``auto`` stays.

    Raises:
        ModelError: No such floating-point dtype.
    """
    if name == "auto":
        return name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"Unknown dtype '{name}'.", remedy="Use float32, bfloat16 or float16.")
    return found


def torch_device(name: str) -> str:
    """A device by name; ``auto`` is the first CUDA device, or the CPU where there is none.

    Raises:
        ModelError: No such device, or not on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        reason = reason if len(reason) < 100 else f"{reason[:97]}..."
        raise ModelError(
            f"Device '{name}' cannot be used: {reason}.",
            remedy="Use cpu, or auto for a GPU if there is one.",
        ) from error
    return name
