"""The attention that a vision tower's class token pays to every patch, for reductions that need it.

It is recorded while images are encoded, at the layer whose output the projector gets, and from the
layer's input alone: one product with the key projection, and one query. The tower keeps its fast
attention kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from yopo.models.family import Family
from yopo.models.streams import Stream
from yopo.reduction.method import Method
from yopo.support.context import PerContext
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION = "tower_attention"
"""Its name among the information about images (see ``models.image_info``)."""

_RECORDED: PerContext[nn.Module, torch.Tensor] = PerContext("yopo_tower_attention")


def attention_path(method: Method | None, family: Family, config: PreTrainedConfig) -> str | None:
    """The tower's attention module under the base model; None if a method does not need it.

    Raises:
        ModelError: The method needs the attention of a class token, and the tower has none.
    """
    if method is None or not method.needs_attention:
        return None
    path = family.class_attention(config)
    if path is None:
        raise ModelError(
            f"{method.name} needs the attention of a class token in the vision tower, and "
            f"{family.name} with the tower '{config.vision_config.model_type}' has none that is "
            "recorded.",
            remedy="Use a method that needs no attention, such as divprune or folder.",
        )
    return path


def record(attention: nn.Module) -> RemovableHandle:
    """Record the class token's attention in every forward of a tower's attention module."""
    return attention.register_forward_pre_hook(_record, with_kwargs=True)


def recorded(attention: nn.Module) -> torch.Tensor | None:
    """What this context's last forward recorded: (images, patches) float32, 1 in sum; forgets
    it."""
    found = _RECORDED.get(attention)
    _RECORDED.set(attention, None)
    return found


def laid_out(found: torch.Tensor, visual: Stream) -> torch.Tensor | None:
    """The attention on every visual token of a batch: (batch, visual), 0 on padding.

    Args:
        found: (images, patches) of a batch's images, in prompt order. Beam search repeats every
            row but passes its images once; repeated rows then share them.
        visual: The visual tokens.

    Returns:
        None if it is of other images than those.
    """
    flat, counts = found.flatten(), [len(each) for each in visual.by_row()]
    repeats = max(sum(counts) // len(flat), 1)
    if repeats * len(flat) != sum(counts) or counts != _repeated(counts[::repeats], repeats):
        return None
    result = flat.new_zeros(visual.index.shape)
    for number, part in enumerate(flat.split(counts[::repeats])):
        for row in range(number * repeats, (number + 1) * repeats):
            result[row, : len(part)] = part
    return result


def _repeated(counts: list[int], repeats: int) -> list[int]:
    return [count for count in counts for _ in range(repeats)]


@torch.no_grad()
def _record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    states = args[0] if args else kwargs["hidden_states"]
    own = cast(Any, module)
    heads = (len(states), -1, own.num_heads, own.head_dim)
    kind = torch.promote_types(states.dtype, torch.float32)
    query = own.q_proj(states[:, :1]).view(heads).transpose(1, 2).to(kind)
    keys = own.k_proj(states).view(heads).transpose(1, 2).to(kind)
    weights = (own.scale * (query @ keys.transpose(2, 3)))[:, :, 0].softmax(dim=-1)
    patches = weights.mean(dim=1)[:, 1:]  # over heads, without the class token itself
    _RECORDED.set(module, patches / patches.sum(dim=1, keepdim=True).clamp(min=1e-30))
