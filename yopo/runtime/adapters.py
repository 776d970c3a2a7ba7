"""Linear layers wrapped in LoRA adapters (PEFT), for callers that use only part of such a layer.

A slice of a weight is multiplied functionally, bypassing the adapter's own ``forward``, so the
adapter's contribution must be sliced like the weight. This is implemented for plain LoRA, whose
delta is a product of two small matrices. Any other module in place of a projection is refused: a
whole layer can be called whatever its type, a part of it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import nn

from yopo.support.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    class _Lora(nn.Module):
        """The attributes of PEFT's layer that are used here; adapters are keyed by name."""

        base_layer: nn.Module
        disable_adapters: bool
        merged: bool
        active_adapters: list[str]
        lora_A: Mapping[str, nn.Linear]
        lora_B: Mapping[str, nn.Linear]
        lora_dropout: Mapping[str, nn.Module]
        lora_variant: Mapping[str, object]
        scaling: Mapping[str, float]
        unmerge: Callable[[], None]


_LORA = ("peft.tuners.lora.layer", "Linear")
"""Module and name of the class; PEFT itself need not be installed."""


@dataclass(frozen=True)
class Adapter:
    """One active LoRA adapter: ``scaling * enter(drop(inputs))``, then ``leave``.

    Attributes:
        enter: (rank, inputs) weight, no bias.
        leave: (outputs, rank) weight, possibly a bias.
        drop: Dropout of the inputs.
        scaling: Factor on the output.
    """

    enter: nn.Linear
    leave: nn.Linear
    drop: Callable[[torch.Tensor], torch.Tensor]
    scaling: float


def parts_of(module: nn.Module | None, where: str) -> tuple[nn.Linear, list[Adapter]]:
    """Split a projection into its linear layer and the adapters that are currently active.

    Merged and disabled adapters add nothing; a merged adapter that was disabled is unmerged, as in
    its own forward.

    Args:
        module: The module found as the projection, or None.
        where: Its name in error messages (``layer 3's q_proj``).

    Raises:
        ModelError: Neither a plain floating-point linear layer nor one with plain LoRA.
    """
    if not _is_lora(module):
        return _plain(module, where), []
    base = _plain(module.base_layer, where)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, partial) and "adapter_names" in hook.keywords:
            raise ModelError(
                f"{where} was given a different adapter for each row (adapter_names), which a "
                "pruned model does not support for visual tokens.",
                remedy="Run the rows of each adapter separately, after set_adapter.",
            )
    if module.disable_adapters and module.merged:
        module.unmerge()
    active = [name for name in module.active_adapters if name in module.lora_A]
    for name in active:
        if name in module.lora_variant:
            kind = type(module.lora_variant[name]).__name__.removesuffix("LinearVariant")
            raise ModelError(
                f"{where} has a {kind} adapter, expected a plain linear layer or plain LoRA.",
                remedy="Merge the adapter (merge_and_unload), or train plain LoRA.",
            )
    if module.disable_adapters or module.merged:
        return base, []
    return base, [
        Adapter(
            module.lora_A[name],
            module.lora_B[name],
            module.lora_dropout[name],
            module.scaling[name],
        )
        for name in active
    ]


def _is_lora(module: nn.Module | None) -> TypeGuard[_Lora]:
    return (type(module).__module__, type(module).__name__) == _LORA


def _plain(module: nn.Module | None, where: str) -> nn.Linear:
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        raise ModelError(
            f"{where} is a {type(module).__name__}, expected a plain linear layer or plain LoRA.",
            remedy="Merge adapters; quantize with torchao, whose weights can be cut: "
            "yopo.load(..., quantization_config=TorchAoConfig(Int8WeightOnlyConfig())).",
        )
    return module


def has_adapters(model: nn.Module) -> bool:
    """Whether a model contains PEFT layers of any kind."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT one; any other model itself."""
    is_peft = hasattr(type(model), "get_base_model")
    return cast("PreTrainedModel", cast("PeftModel", model).get_base_model() if is_peft else model)
