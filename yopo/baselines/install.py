"""Put a rival to work on a model in memory, for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from yopo.baselines.baseline_decoder import RivalDecoder
from yopo.baselines.forward import RivalState
from yopo.baselines.masked import Masks
from yopo.baselines.settings import Setting, solve_for
from yopo.models.family import GridsOf
from yopo.models.layout import LayoutProbe
from yopo.models.registry import family_of
from yopo.plans.checks import check_tensors
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import check_model
from yopo.runtime.swap import restore_class, swap_class
from yopo.support.errors import ModelError, PlanError


@contextmanager
def rival(
    model: PreTrainedModel,
    which: str | Setting,
    plan: PruningPlan | None = None,
    *,
    budget: float | None = None,
    grids_of: GridsOf | None = None,
) -> Iterator[PreTrainedModel]:
    """Run a model under a rival inside a ``with`` block; it is restored bit for bit behind.

    Prefill, decode steps and ``generate`` (greedy or sampling) work as ever; the rows of a batch
    hold equally many visual tokens, and images are in the first turn.

    Args:
        model: A multimodal model of a supported family, dense, in memory.
        which: A name of ``settings.NAMES``, solved for the plan's prompt; or a ready setting.
        plan: Says which visual budget on which prompt; what ``masked`` simulates. A ready setting
            of another rival needs none.
        budget: Visual FLOPs over the dense model's, instead of the plan's.
        grids_of: Locates images instead of the family's rule (made-up features).

    Yields:
        The same model object.

    Raises:
        ModelError: The model is unsupported, not of the plan's shape, or already changed.
        PlanError: No such rival, no plan where one is needed, or a budget that it cannot meet.
    """
    decoder = model.get_decoder()
    if hasattr(decoder, "yopo") or hasattr(decoder, "rival"):
        raise ModelError(
            "The model is pruned or under a rival already.", remedy="Leave the first block before."
        )
    setting = which if isinstance(which, Setting) else _solved(which, plan, budget)
    family = family_of(model.config)
    names = family.backbone(model.config)
    if plan is not None:
        check_model(model, plan, check=False)
    elif setting.name == "masked":
        raise PlanError("The masked rival simulates a plan.", remedy="Give one.")
    if setting.name == "downsample" and family.ends_rows(model.config):
        raise ModelError(
            f"{family.name} ends image rows with newline tokens, which downsampling cannot place.",
            remedy="Compare with vtw and fastv.",
        )
    if setting.name == "masked":
        check_tensors(plan)
    probe = LayoutProbe(
        model.base_model, grids_of or family.grids_of, family.token_ids(model.config)
    )
    state = RivalState(setting, names, probe)
    stock, decoder.rival = type(decoder), state
    try:
        swap_class(decoder, rival_class(stock))
        if setting.name == "masked":
            state.masks = Masks(plan, decoder, names)
        yield model
    finally:
        if state.masks is not None:
            state.masks.remove()
        probe.remove()
        if type(decoder) is not stock:
            restore_class(decoder, stock)
        del decoder.rival


def _solved(name: str, plan: PruningPlan | None, budget: float | None) -> Setting:
    if plan is None:
        raise PlanError(
            f"Which budget on which prompt the rival '{name}' is to meet, a plan must say.",
            remedy="Give a plan, or a ready setting.",
        )
    return solve_for(name, plan, budget)


@contextmanager
def teacher_forced(model: PreTrainedModel, answers: torch.Tensor | None) -> Iterator[None]:
    """Let answers stand behind the prompts of the forwards in this block.

    FastV ranks by the prompt's last token: with the answer in the same sequence, that is the token
    in front of it. Other rivals and other models do not care.

    Args:
        model: Inside or outside a ``rival`` block.
        answers: (batch, sequence) bool, True on answer tokens, which end their rows; or None.
    """
    state: RivalState | None = getattr(model.get_decoder(), "rival", None)
    if state is None or answers is None:
        yield
        return
    last = answers.shape[1] - 1
    state.ends = last - answers.sum(dim=1)
    try:
        yield
    finally:
        state.ends = None


@cache
def rival_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The rivals' subclass of a decoder class; it keeps the name that transformers looks at."""
    members = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (RivalDecoder, stock), members)
