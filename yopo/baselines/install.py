"""Apply a baseline to a model in memory, for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from yopo.baselines.baseline import Baseline, Hooks
from yopo.baselines.baseline_decoder import BaselineDecoder
from yopo.baselines.forward import BaselineState
from yopo.baselines.registry import solve_for
from yopo.models.family import GridsOf
from yopo.models.layout import LayoutProbe
from yopo.models.registry import family_of
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import check_model
from yopo.runtime.swap import restore_class, swap_class
from yopo.support.errors import ModelError, PlanError


@contextmanager
def baseline(
    model: PreTrainedModel,
    which: str | Baseline,
    plan: PruningPlan | None = None,
    *,
    budget: float | None = None,
    grids_of: GridsOf | None = None,
) -> Iterator[PreTrainedModel]:
    """Run a model under a baseline inside a ``with`` block, then restore it bit for bit.

    Prefill, decode steps and ``generate`` (greedy or sampling) work as usual; the rows of a batch
    must hold the same number of visual tokens, and images must be in the first turn.

    Args:
        model: A multimodal model of a supported family, dense, in memory.
        which: A name in ``registry.BASELINES``, solved for the plan's prompt; or a method with
            parameters.
        plan: Gives the visual budget and the prompt, and is the plan that a method with
            ``needs_plan`` demonstrates; not needed otherwise by a method with parameters.
        budget: Visual FLOPs over the dense model's, instead of the plan's.
        grids_of: Locates images instead of the family's rule (synthetic features).

    Yields:
        The same model object.

    Raises:
        ModelError: The model is unsupported, not of the plan's shape, already changed, or not
            supported by this method.
        PlanError: No such baseline, no plan where one is needed, or a budget that it cannot meet.
    """
    decoder = model.get_decoder()
    if hasattr(decoder, "yopo") or hasattr(decoder, "baseline"):
        raise ModelError(
            "The model is already pruned or under a baseline.",
            remedy="Leave the first block before.",
        )
    method = which if isinstance(which, Baseline) else _solved(which, plan, budget)
    family = family_of(model.config)
    names = family.backbone(model.config)
    if plan is not None:
        check_model(model, plan, check=False)
    method.check_model(model, family)
    attention = method.tower_attention(family, model.config)
    tokens = family.token_ids(model.config)
    probe = LayoutProbe(model.base_model, grids_of or family.grids_of, tokens, attention)
    state = BaselineState(method, names, probe, Hooks())
    stock: type[nn.Module] = type(decoder)
    decoder.baseline = state
    try:
        swap_class(decoder, decoder_class(stock))
        state.hooks = method.hooks(decoder, names, plan)
        yield model
    finally:
        state.hooks.remove()
        probe.remove()
        if type(decoder) is not stock:
            restore_class(decoder, stock)
        del decoder.baseline


def _solved(name: str, plan: PruningPlan | None, budget: float | None) -> Baseline:
    if plan is None:
        raise PlanError(
            f"The baseline '{name}' needs a plan for its budget and prompt.",
            remedy="Pass a plan, or a method with parameters.",
        )
    return solve_for(name, plan, budget)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def decoder_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The baselines' subclass of a decoder class, under the name that transformers checks."""
    if stock not in _CLASSES:
        members = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
        _CLASSES[stock] = type(stock.__name__, (BaselineDecoder, stock), members)
    return _CLASSES[stock]
