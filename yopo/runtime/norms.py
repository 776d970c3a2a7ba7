"""Norms in one kernel where a call costs more than the rows that it is for.

transformers' RMS norms are half a dozen operations each. On a CPU that is as good as one, but a GPU
at the size of one prompt spends more time on starting kernels than on their work, and the two
streams of a pruned layer have twice as many norms as a stock one. torch's own norm differs by
rounding: it rounds once, after the weight, where transformers' rounds before it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import cast

import torch
from torch import nn
from torch.nn.functional import rms_norm

from yopo.runtime import few_calls

Norm = Callable[[torch.Tensor], torch.Tensor]
"""Maps (..., width) states to normed ones."""

_EPSILONS = ("variance_epsilon", "eps")
"""Attributes that hold the epsilon of transformers' RMS norms."""


def norm_for(module: nn.Module, device: torch.device) -> Norm:
    """A layer's norm for states on a device: the module itself, or one kernel that equals it.

    The module runs where it is more than a plain RMS norm: adapted, hooked, offloaded.
    """
    if not few_calls.preferred_on(device) or not _is_bare(module) or not is_rms(type(module)):  # type: ignore[arg-type]  # classes are hashable
        return module
    weight = module.weight
    assert isinstance(weight, torch.Tensor), "bare RMS norms have a weight"
    return partial(_one_kernel, weight=weight, epsilon=_epsilon(module))


def _one_kernel(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return rms_norm(states, (states.shape[-1],), weight, epsilon)


def _is_bare(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return not hooks and "forward" not in vars(module) and "_hf_hook" not in vars(module)


def _epsilon(module: nn.Module) -> float:
    return next(float(vars(module)[name]) for name in _EPSILONS if name in vars(module))


@cache
def is_rms(kind: type[nn.Module]) -> bool:
    """Whether a class computes ``weight * x / sqrt(mean(x^2) + epsilon)``, found by trying it."""
    if "RMSNorm" not in getattr(kind, "__name__", ""):
        return False
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(4, 8, generator=generator), torch.randn(8, generator=generator)
    try:
        with torch.no_grad(), torch.device("cpu"):
            module = cast("Callable[..., nn.Module]", kind)(8, eps=0.1)
            module.load_state_dict({"weight": weight})
            expected = _one_kernel(states, weight, _epsilon(module))
            found: torch.Tensor = module(states)
            return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    except (AttributeError, RuntimeError, StopIteration, TypeError):
        return False
