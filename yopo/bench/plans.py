"""Plans to time: presets without calibration, other prompts, fewer layers.

Time depends on how many heads, neurons and layers a plan keeps, not on which: so a plan with
made-up scores, made by the real planner in the real baking order, costs the same as a calibrated
one for the same request.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import torch

from yopo.calibration.statistics import MAX_DISTANCE, Statistics
from yopo.checkpoint.order import baked_plan, order_layers
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest, PaperRequest
from yopo.plans.flops import visual_budget
from yopo.plans.grid import Grid
from yopo.plans.schema import Budget, LayerPlan, ModelIdentity, PruningPlan, Workload
from yopo.plans.tensors import PlanTensors, refit_sizes
from yopo.support.errors import PlanError, suggest

PRESETS: dict[str, BudgetRequest | PaperRequest] = {
    "yopo-25": PaperRequest(preset="yopo-25"),
    "yopo-12": PaperRequest(preset="yopo-12"),
    "reader-12": BudgetRequest(0.12, template="reader", compensation="none"),
}
"""The paper's two shapes, and frozen visual tokens that the text reads in most layers."""

FITTED, FITTED_BUDGET = "fitted-12", 0.12
"""A uniform plan with fitted weights, at the budget in its name: see :func:`fitted_plan`."""


def preset_plan(
    name: str, model: ModelIdentity, workload: Workload, *, seed: int = 0
) -> PruningPlan:
    """A preset for a model's shape, with made-up scores, as if baked.

    Args:
        name: Key in ``PRESETS``, or ``FITTED``.
        model: The model to plan for.
        workload: The prompt that budgets are solved for.
        seed: Seed of the scores.

    Raises:
        PlanError: No such preset, or it does not fit the shape.
    """
    if name == FITTED:
        return fitted_plan(model, workload)
    if name not in PRESETS:
        known = (*PRESETS, FITTED)
        raise PlanError(f"Unknown preset '{name}'.", remedy=suggest(name, known))
    statistics = made_up_statistics(model, workload, seed=seed)
    plan, _ = make_plan(statistics, PRESETS[name])
    plan = baked_plan(plan, order_layers(plan))
    return replace(plan, measured=None, provenance={"preset": name, "scores": "made up"})


def fitted_plan(model: ModelIdentity, workload: Workload) -> PruningPlan:
    """A typical allocation, the same in all layers and as wide as the budget allows.

    Text reads in all heads; visual tokens attend in a quarter of them, go through one bottleneck,
    and have a linear map of 1/32 of the width and 1/32 of the neurons instead of the FFN.

    Raises:
        PlanError: It does not fit the shape.
    """
    shape = model.shape
    heads = tuple(range(shape.heads))
    attend = tuple(head for head in heads if head % shape.group < max(1, shape.group // 4))
    if shape.group < 4:
        attend = heads[: max(1, shape.heads // 4)]

    def plan_of(rank: int) -> PruningPlan:
        layer = LayerPlan(
            heads, attend, None, shape.ffn // 32, rank, map_rank=max(1, shape.hidden // 32)
        )
        plan = PruningPlan(
            model=model,
            workload=workload,
            layers=(layer,) * shape.layers,
            budget=Budget(None, 1.0),
            compensation="refit",
            baked=True,
            provenance={"preset": FITTED, "weights": "made up"},
        )
        return replace(plan, budget=Budget(None, visual_budget(plan)))

    step = max(1, shape.hidden // 128)  # odd widths keep a GPU's matrix units from running
    low, high = 0, shape.hidden // step
    while low < high:
        middle = (low + high + 1) // 2
        if plan_of(middle * step).budget.reached <= FITTED_BUDGET:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise PlanError(f"The preset {FITTED} does not fit the shape of {model.name}.")
    return plan_of(low * step)


def made_up_refit(plan: PruningPlan) -> PlanTensors:
    """Random weights of the sizes that a plan with ``compensation: refit`` needs."""
    generator = torch.Generator().manual_seed(0)
    shape = plan.model.shape
    refit = {
        index: {
            name: torch.randn(size, generator=generator) / shape.hidden**0.5
            for name, size in refit_sizes(layer, shape).items()
        }
        for index, layer in enumerate(plan.layers[: plan.visual_depth])
    }
    return PlanTensors(refit=refit)


def made_up_statistics(model: ModelIdentity, workload: Workload, *, seed: int) -> Statistics:
    """Uniformly random scores in the form of a calibration's statistics."""
    generator, shape = torch.Generator().manual_seed(seed), model.shape
    layers, heads = shape.layers, shape.heads

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    return Statistics(
        model=model,
        workload=workload,
        rho=draw(1, layers, heads).float(),
        neuron_square=draw(layers, shape.ffn),
        neuron_sum=draw(layers, shape.ffn),
        head_sum=draw(layers, heads, shape.head_dim),
        head_effect_sum=draw(layers, heads),
        text_norm_sum=torch.ones(layers, dtype=torch.float64),
        cross_modal_sum=draw(layers),
        locality_sum=draw(layers, MAX_DISTANCE + 2),
        key_square_sum=torch.ones(layers, shape.kv_heads, shape.head_dim, dtype=torch.float64),
        down_norm=torch.ones(layers, shape.ffn, dtype=torch.float64),
        visual_tokens=1,
        text_queries=1,
        provenance={},
    )


def with_prompt(
    plan: PruningPlan, *, visual: int | None = None, text: int | None = None
) -> PruningPlan:
    """The plan for a prompt of other sizes.

    Args:
        plan: A plan.
        visual: Visual tokens; None: the plan's own images.
        text: Text tokens; None: the plan's own number.

    Raises:
        PlanError: The visual tokens do not form whole images.
    """
    workload = plan.workload
    if visual is not None and visual != workload.visual:
        workload = workload.moved(grids=grids_for(visual, workload.grids))
    if text is not None:
        workload = workload.moved(text=text)
    moved = replace(plan, workload=workload)
    return replace(moved, budget=Budget(None, visual_budget(moved)))


def grids_for(visual: int, known: tuple[Grid, ...] = ()) -> tuple[Grid, ...]:
    """Images with this many visual tokens: copies of the known ones, or one square.

    Raises:
        PlanError: Neither fits.
    """
    tokens = sum(grid.tokens for grid in known)
    if tokens and visual % tokens == 0:
        return known * (visual // tokens)
    side = math.isqrt(visual)
    if side and side**2 == visual:
        return (Grid(side, side),)
    whole = f"a multiple of {tokens} (the plan's images) or " if tokens else ""
    raise PlanError(
        f"{visual} visual tokens do not form whole images.",
        remedy=f"Use {whole}a square number.",
    )


def sampled_layers(plan: PruningPlan, count: int) -> tuple[int, ...]:
    """Sample layers that represent the plan: each kind in proportion, evenly spaced.

    A layer's kind determines its cost: whether it reads, whether it attends and how far, whether
    the visual FFN runs on none, a part or all of its neurons, whether visual tokens have fitted
    weights, whether they are gone.

    Args:
        plan: A plan.
        count: Number of layers, from one to all.

    Returns:
        Layer indices, ascending.

    Raises:
        PlanError: More layers than the plan has.
    """
    if not 1 <= count <= len(plan.layers):
        raise PlanError(f"Cannot sample {count} layers from a plan with {len(plan.layers)}.")
    kinds: dict[tuple, list[int]] = defaultdict(list)
    for index, layer in enumerate(plan.layers):
        kinds[_kind(layer, plan, index)].append(index)
    groups = list(kinds.values())
    shares = [count * len(group) / len(plan.layers) for group in groups]
    takes = [int(share) for share in shares]
    by_remainder = sorted(
        range(len(groups)), key=lambda place: (takes[place] - shares[place], -len(groups[place]))
    )
    for place in by_remainder[: count - sum(takes)]:
        takes[place] += 1
    chosen = [
        group[int((number + 0.5) * len(group) / take)]
        for group, take in zip(groups, takes, strict=True)
        for number in range(take)
    ]
    return tuple(sorted(chosen))


def _kind(layer: LayerPlan, plan: PruningPlan, index: int) -> tuple[object, ...]:
    neurons = (layer.neurons > 0) + (layer.neurons == plan.model.shape.ffn)
    gone = index >= plan.visual_depth
    fitted = (layer.qkv_rank is None, layer.map_rank > 0)
    return bool(layer.read_heads), bool(layer.attend_heads), layer.radius, neurons, gone, fitted


def with_layers(plan: PruningPlan, indices: tuple[int, ...]) -> PruningPlan:
    """A plan with some of the layers, for a model that has only those."""
    shape = replace(plan.model.shape, layers=len(indices))
    few = replace(
        plan,
        model=replace(plan.model, shape=shape),
        layers=tuple(plan.layers[index] for index in indices),
        tensors=plan.tensors.of_layers(indices),
        measured=None,
    )
    return replace(few, budget=Budget(None, visual_budget(few)))
