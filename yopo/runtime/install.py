"""Apply a plan to a model in memory, for the length of a ``with`` block or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MethodType

from torch import nn
from transformers import PreTrainedModel

from yopo.models.family import Backbone, Family, GridsOf, shape_of
from yopo.models.fingerprint import fingerprint_of_decoder, is_same
from yopo.models.layout import LayoutProbe
from yopo.models.registry import family_of
from yopo.models.tower_attention import attention_path
from yopo.plans.checks import check_tensors
from yopo.plans.made_up import refuse_made_up
from yopo.plans.schema import PruningPlan
from yopo.plans.storage import read_plan
from yopo.plans.tensors import PlanTensors
from yopo.runtime.adapters import unwrapped
from yopo.runtime.decoder import PrunedDecoder, PrunedState
from yopo.runtime.inputs import no_paged_attention
from yopo.runtime.labels import LabelProbe
from yopo.runtime.offload import is_fetched
from yopo.runtime.saved import Writer, make_savable, restore_saving
from yopo.runtime.swap import restore_class, swap_class
from yopo.runtime.weights import check_plain, visual_layers
from yopo.support.errors import ModelError


@contextmanager
def pruned(
    model: PreTrainedModel,
    plan: PruningPlan | str | Path,
    *,
    grids_of: GridsOf | None = None,
    check: bool = True,
    trainable: bool = False,
    cuda_graphs: bool = True,
) -> Iterator[PreTrainedModel]:
    """Run a model under a plan inside a ``with`` block, then restore it bit for bit.

    The plan applies to the model, not to a thread: all threads that use the model run under it,
    including a streamer's. A forward in progress when another thread enters or leaves the block
    finishes as it began, or is dense throughout. A ``generate`` in progress fails at its next step:
    its cache belongs to the other model.

    Example:
        >>> dense = AutoModelForImageTextToText.from_pretrained(LLAVA_TINY)
        >>> with yopo.pruned(dense, "plan.yaml"):
        ...     yopo.is_pruned(dense)
        True
        >>> yopo.is_pruned(dense)
        False

    Args:
        model: A multimodal model of a supported family, weights in memory; or the PEFT model
            around it.
        plan: A plan, or the path of its YAML file.
        grids_of: Locates images among visual tokens instead of the family's rule (custom towers).
        check: Whether the model's fingerprint must match the plan's.
        trainable: Whether fitted weights are parameters (see :func:`fitted_parameters`).
        cuda_graphs: Whether prefills of a kind that comes again are replayed on a GPU
            (``yopo/runtime/replay.py``).

    Yields:
        The same model object.

    Raises:
        ModelError: The model is unsupported, not the plan's model, or already pruned.
        PlanError: The plan cannot be read.
    """
    if not isinstance(plan, PruningPlan):
        plan = read_plan(plan)
    install(
        model,
        plan,
        grids_of=grids_of,
        check=check,
        trainable=trainable,
        cuda_graphs=cuda_graphs,
    )
    try:
        yield model
    finally:
        uninstall(model)


def install(
    model: PreTrainedModel,
    plan: PruningPlan,
    *,
    grids_of: GridsOf | None = None,
    check: bool = True,
    trainable: bool = False,
    cuda_graphs: bool = True,
    writer: Writer | None = None,
) -> None:
    """Prune a model in memory until :func:`uninstall`; arguments and errors as for ``pruned``.

    Args:
        writer: Adds the pruned parts to what ``save_pretrained`` wrote; None: the plan is not part
            of the model, which is saved dense.
    """
    model = unwrapped(model)
    decoder = model.get_decoder()
    if hasattr(decoder, "yopo"):
        raise ModelError("The model is already pruned.", remedy="Leave the first block before.")
    family, names = check_model(model, plan, check=check)
    check_tensors(plan)
    layers = visual_layers(decoder, plan, names, trainable=trainable)
    tokens = family.token_ids(model.config)
    # Other threads may be using the model: set up what the pruned forward needs, then swap it in.
    attention = attention_path(plan.reduction, family, model.config)
    probe = LayoutProbe(model.base_model, grids_of or family.grids_of, tokens, attention)
    # Orders and fitted weights are in the layers now; do not keep them in memory twice.
    labels = LabelProbe(model)
    state = PrunedState(
        _with_only_means(plan), layers, names, probe, labels, cuda_graphs=cuda_graphs
    )
    decoder.yopo = state.train(decoder.training)
    try:
        # mypy compares the class's own __hash__, which takes an object, with Hashable's.
        swap_class(decoder, pruned_class(type(decoder)))  # type: ignore[arg-type]
    except ModelError:
        _remove_probes(decoder)
        raise
    vars(model)[_CONTINUOUS_BATCHING] = MethodType(_refuse_continuous_batching, model)
    make_savable(model, writer)
    probe.must_be_read = True


def _with_only_means(plan: PruningPlan) -> PruningPlan:
    kept = plan.tensors
    scale = kept.key_scale if plan.needs_key_scale else None
    means = PlanTensors(neuron_mean=kept.neuron_mean, head_mean=kept.head_mean, key_scale=scale)
    return replace(plan, tensors=means)


def uninstall(model: PreTrainedModel) -> None:
    """Make a pruned model dense again."""
    model = unwrapped(model)
    restore_saving(model)
    decoder = model.get_decoder()
    decoder.yopo.probe.must_be_read = False
    restore_class(decoder, type(decoder).__mro__[2])
    vars(model).pop(_CONTINUOUS_BATCHING, None)
    _remove_probes(decoder)


def _remove_probes(decoder: PrunedDecoder) -> None:
    state = decoder.yopo
    state.probe.remove()
    state.labels.remove()
    del decoder.yopo


_CONTINUOUS_BATCHING = "init_continuous_batching"
"""The method that transformers' ``generate_batch`` and ``serve`` start with."""


def _refuse_continuous_batching(model: PreTrainedModel, *args: object, **kwargs: object) -> None:
    raise no_paged_attention()


@cache
def pruned_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The pruned subclass of a decoder class, under the same name, which transformers checks."""
    members = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (PrunedDecoder, stock), members)


def fitted_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The fitted weights of a pruned model as parameters, by name.

    An optimizer finds them among ``model.parameters()``. PEFT freezes all parameters but its own:
    call ``requires_grad_()`` on these to train them along with an adapter.

    Args:
        model: Loaded or pruned with ``trainable=True``, possibly inside a PEFT model.

    Raises:
        ModelError: It has no such parameters.
    """
    state = getattr(unwrapped(model).get_decoder(), "yopo", None)
    found = {} if state is None else dict(state.named_parameters())
    if not found:
        raise ModelError(
            "The model has no trainable fitted weights.",
            remedy="Load a plan with fitted weights: yopo.load(..., trainable=True).",
        )
    return found


def check_model(
    model: PreTrainedModel, plan: PruningPlan, *, check: bool
) -> tuple[Family, Backbone]:
    """Check that a model is the one the plan was made for.

    Returns:
        Its family and the names of its decoder's modules.

    Raises:
        ModelError: The family, shape or fingerprint differs, or weights are not plain or nowhere.
    """
    if check:
        refuse_made_up(plan)
    family = family_of(model.config)
    shape = shape_of(model.config)
    if family.name != plan.model.family or shape != plan.model.shape:
        raise ModelError(
            f"The plan was made for {plan.model.name} ({plan.model.family}, {plan.model.shape}), "
            f"found {family.name} with {shape}."
        )
    names = family.backbone(model.config)
    check_plain(model.get_decoder(), plan.visual_depth, names)
    if check:
        _check_fingerprint(model.get_decoder(), plan)
    return family, names


def _check_fingerprint(decoder: nn.Module, plan: PruningPlan) -> None:
    here = (module for module in decoder.modules() if not is_fetched(module))
    if any(weight.is_meta for module in here for weight in module.parameters(recurse=False)):
        raise ModelError(
            "Part of the decoder is on the meta device: its fingerprint cannot be computed.",
            remedy="Load with a device_map that keeps the decoder on real devices.",
        )
    found = fingerprint_of_decoder(decoder)
    if not is_same(found, plan.model.fingerprint):
        raise ModelError(
            f"The plan was made for {plan.model.name} with fingerprint "
            f"{plan.model.fingerprint[:12]}..., the model's is {found[:12]}...",
            remedy="Calibrate this model, or pass check=False if only its dtype differs.",
        )
