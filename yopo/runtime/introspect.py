"""Find out whether a model in memory is pruned, and by which plan."""

from __future__ import annotations

from torch import nn

from yopo.plans.schema import PruningPlan
from yopo.runtime.decoder import PrunedState


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan that a model runs under; ``plan_of(model).budget.reached`` is its visual budget.

    Args:
        model: A transformers model, or any wrapper around one: PEFT's, ``torch.compile``'s, your
            own module.

    Returns:
        The plan, without the neuron order and the fitted weights, which the model's layers hold;
        None for a dense model.
    """
    for module in model.modules():
        state = getattr(module, "yopo", None)
        if isinstance(state, PrunedState):
            return state.plan
    return None


def is_pruned(model: nn.Module) -> bool:
    """Whether a model, or one inside it, skips visual computation under a plan.

    Example:
        >>> yopo.is_pruned(model), round(yopo.plan_of(model).budget.reached, 2) <= 0.25
        (True, True)
    """
    return plan_of(model) is not None
