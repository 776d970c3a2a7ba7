"""Models from disk or hub: dense ones to measure, pruned ones to serve."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from yopo.checkpoint.completion import Completion
from yopo.checkpoint.download import HUB_OPTIONS
from yopo.checkpoint.reader import Checkpoint, fetch, fetch_some, read_source
from yopo.models.fingerprint import Source, is_same, remember_source
from yopo.models.offloaded import named_weights
from yopo.models.registry import ModelSource, family_of, resolve
from yopo.plans.places import PLAN_FILES, plan_path, refuse_unbaked
from yopo.plans.schema import PruningPlan
from yopo.plans.storage import read_plan
from yopo.runtime.install import install
from yopo.support.dtypes import full_name, unknown_dtype
from yopo.support.errors import CheckpointError, ModelError
from yopo.support.finite import check_weights
from yopo.support.out_of_memory import is_out_of_memory

_PLACE = ("revision", "subfolder", *HUB_OPTIONS)
"""Arguments that locate a checkpoint, as opposed to how it is loaded."""


@dataclass(frozen=True, eq=False)
class Baked:
    """A checked baked checkpoint, whose weights remain to be loaded.

    Attributes:
        checkpoint: Its directory, in the hub's cache if it is from the hub.
        source: Name of its source in messages.
        plan: The plan to load it with.
    """

    checkpoint: Checkpoint
    source: Source
    plan: PruningPlan


def load(
    path: str | Path,
    *,
    budget: float | None = None,
    trainable: bool = False,
    cuda_graphs: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a baked checkpoint as a model that skips the pruned work.

    Example:
        >>> model = yopo.load("llava-tiny-yopo")
        >>> type(model).__name__
        'LlavaForConditionalGeneration'

    Args:
        path: A directory that ``yopo apply`` wrote, or the hub id of one (``org/name[@revision]``).
        budget: Selects, among several baked plans, the one with the largest visual budget that is
            not above this one; None: the first.
        trainable: Whether the plan's fitted weights are parameters, for recovery training; see
            ``yopo.runtime.saved``.
        cuda_graphs: Whether prefills of a kind that comes again are replayed on a GPU; see
            ``yopo.runtime.replay``.
        **kwargs: Passed to ``from_pretrained`` (``dtype``, ``device_map``, ``revision``,
            ``subfolder``, ``quantization_config``, ...).

    Returns:
        A transformers model of the checkpoint's own class; its ``save_pretrained`` and
        ``push_to_hub`` write a checkpoint like this one.

    Raises:
        CheckpointError: Not a baked checkpoint, a tensor is missing, or no plan within the budget.
        ModelError: The weights are not those that the plan was baked into.
    """
    baked = open_baked(path, budget, **_take(kwargs, _PLACE))
    stock = _stock_class(baked.checkpoint.config)
    model, _ = _from_folder(stock, baked.checkpoint, str(path), **kwargs)
    _install(model, baked, trainable=trainable, cuda_graphs=cuda_graphs)
    return model


def _install(
    model: PreTrainedModel, baked: Baked, *, trainable: bool = False, cuda_graphs: bool = True
) -> None:
    writer = Completion(baked.checkpoint.path)
    # Not checked again: the files were, whose precision, unlike that in memory, is fixed.
    install(
        model,
        baked.plan,
        check=False,
        trainable=trainable,
        cuda_graphs=cuda_graphs,
        writer=writer,
    )
    remember_source(model.get_decoder(), baked.source)


def open_baked(path: str | Path, budget: float | None = None, **place: Any) -> Baked:
    """Find a baked checkpoint, locally or on the hub, and check it against its plan.

    Args:
        path: As for :func:`load`.
        budget: As for :func:`load`.
        **place: ``revision``, ``subfolder`` and ``HUB_OPTIONS``.

    Raises:
        CheckpointError: It holds no plan (raised before weights are downloaded), or is incomplete.
        ModelError: It cannot be reached, or its weights are not those that it was baked with.
    """
    source = resolve(str(path))
    revision, subfolder = place.pop("revision", None), place.pop("subfolder", None) or ""
    if not source.is_local and revision is not None:
        source = replace(source, revision=revision)
    small = fetch_some(source, ("config.json", PLAN_FILES), subfolder=subfolder, **place)
    refuse_unbaked(small, source.name)
    checkpoint = Checkpoint.open(fetch(source, subfolder=subfolder, **place))
    plan = read_baked_plan(checkpoint.path, budget)
    files = read_source(checkpoint)
    if not is_same(files.fingerprint, plan.model.fingerprint):
        raise ModelError(
            f"{path}: its weights are not those that its plan was baked into: found fingerprint "
            f"{files.fingerprint}, expected {plan.model.fingerprint}.",
            remedy="Restore the weights, or calibrate and apply again.",
        )
    return Baked(checkpoint, files, plan)


def read_baked_plan(path: str | Path, budget: float | None = None) -> PruningPlan:
    """The plan inside a baked checkpoint's directory (see :func:`load`).

    Raises:
        CheckpointError: The directory holds no plan, or none within the budget.
    """
    return read_plan(plan_file(Path(path), budget))


def plan_file(folder: Path, budget: float | None = None) -> Path:
    """The plan's file inside a baked checkpoint's directory (raises as above)."""
    refuse_unbaked(folder, str(folder))
    return plan_path(folder, budget)


def load_dense(
    source: ModelSource, *, checkpoint: Checkpoint | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a model with the stock transformers class, in eval mode.

    Code in the checkpoint is never run: every supported family is a class of transformers.

    Args:
        source: From ``models.registry.resolve``.
        checkpoint: Its directory, if already fetched and opened.
        **kwargs: Passed to ``from_pretrained``; ``dtype`` defaults to the checkpoint's.

    Raises:
        ModelError: The model cannot be reached, is not of a supported family, or is not a model; or
            a weight is not finite.
        CheckpointError: The checkpoint is quantized, damaged or unsuitable, or a weight is missing
            from it (transformers would initialize it at random). Raised before loading weights.
    """
    checkpoint = checkpoint or Checkpoint.open(fetch(source))
    stock = _stock_class(checkpoint.config)
    model, _ = _from_folder(stock, checkpoint, source.location, **kwargs)
    remember_source(model.get_decoder(), read_source(checkpoint))
    return model


def _stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return getattr(transformers, family_of(config).architecture)


def _from_folder(
    stock: type[PreTrainedModel], checkpoint: Checkpoint, name: str, *args: Any, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A stock model with all weights from a checkpoint's directory, and its loading report."""
    _take(kwargs, ("trust_remote_code", "code_revision", "output_loading_info"))
    kwargs = {"dtype": "auto", "config": copy.deepcopy(checkpoint.config), **kwargs}
    try:
        loaded = stock.from_pretrained(checkpoint.path, *args, output_loading_info=True, **kwargs)
        # Annotated as only the model, which it is without the report.
        model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else f"{reason[:297]}..."
        raise ModelError(f"{name}: cannot be loaded: {reason}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name}: {len(missing)} weights are missing, including {missing[0]}.",
            remedy="The checkpoint is incomplete or of another architecture.",
        )
    check_weights(named_weights(model), name)
    model.config.name_or_path = model.name_or_path = name
    return model.eval(), report


def _take(kwargs: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Remove and return the arguments with these names."""
    return {name: kwargs.pop(name) for name in names if name in kwargs}


class PrunedForConditionalGeneration:
    """The class that a baked checkpoint's code resolves to under ``trust_remote_code=True``.

    transformers does not rename checkpoint keys for custom classes, which would leave weights
    random; so the stock class loads them, and the plan is installed afterwards.
    """

    _auto_class = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *args: Any, **kwargs: Any
    ) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
        """Load the stock model of the checkpoint and install its plan.

        ``budget``, ``trainable`` and ``cuda_graphs`` are as for ``load``.

        Returns:
            The model, and the loading report with ``output_loading_info``.
        """
        wants_report = kwargs.get("output_loading_info", False)
        options = _take(kwargs, ("trainable", "cuda_graphs"))
        baked = open_baked(path, kwargs.pop("budget", None), **_take(kwargs, _PLACE))
        stock = cls._stock(baked.checkpoint.config)
        model, report = _from_folder(stock, baked.checkpoint, str(path), *args, **kwargs)
        _install(model, baked, **options)
        return (model, report) if wants_report else model

    @classmethod
    def _stock(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        return _stock_class(config)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """Called by ``from_config``, which has no weights that a plan could apply to.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "A pruned model cannot be created from its configuration alone: its plan needs the "
            "weights.",
            remedy="Use from_pretrained, or from_config with trust_remote_code=False.",
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Required by transformers; nothing is saved from this class."""


class PrunedModel(PrunedForConditionalGeneration):
    """The class for ``AutoModel``: without a language modelling head."""

    @classmethod
    def _stock(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        # The mapping's class is annotated for pairs of tokenizers; this one holds classes.
        return cast("type[PreTrainedModel]", MODEL_MAPPING[type(config)])


def torch_dtype(name: str) -> torch.dtype | str:
    """A dtype by name, also a short one (``bf16``); ``auto`` is returned as it is.

    Raises:
        ModelError: No such floating-point dtype.
    """
    if name == "auto":
        return name
    found = getattr(torch, full_name(name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise unknown_dtype(name)
    return found


def torch_device(name: str) -> str:
    """A device by name; ``auto`` is the first CUDA device, or the CPU where there is none.

    Raises:
        ModelError: There is no such device, or not on this machine.
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
