"""Detects labels that a plan leaves without a prediction: those right after dropped tokens."""

from __future__ import annotations

import inspect
import warnings

import torch
from torch import nn

from yopo.support.context import PerContext

IGNORED = -100
"""The label that a loss ignores."""


class LabelProbe:
    """Records the targets of a forward's loss, by hooks that it can remove.

    Args:
        model: The outermost model, the one that takes ``labels``.
    """

    def __init__(self, model: nn.Module):
        self._signature = inspect.signature(type(model).forward)
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = self._signature.bind_partial(module, *args, **kwargs).arguments
        shifted, labels = kwargs.get("shift_labels"), bound.get("labels")
        if shifted is None and labels is not None:
            shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        _TARGETS.set(self, shifted)

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        _TARGETS.set(self, None)

    def warn_of_dropped(self, dropped: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Warn if labels would be predicted from hidden states that do not exist.

        Args:
            dropped: (batch, dropped) int64, positions of tokens without a hidden state.
            mask: (batch, dropped) bool, False on padding of ``dropped``; None if there is none.
        """
        targets = _TARGETS.get(self)
        if targets is None:
            return
        is_target = targets.gather(1, dropped.to(targets.device)) != IGNORED
        if mask is not None:
            is_target = is_target & mask.to(is_target.device)
        if bool(is_target.any()):
            warnings.warn(
                "Some labels are on visual tokens or right after an image, so they are predicted "
                "from visual tokens that the plan drops before the last layer: their part of the "
                f"loss is a constant. Set these labels to {IGNORED}.",
                stacklevel=2,
            )


_TARGETS: PerContext[LabelProbe, torch.Tensor] = PerContext("yopo_targets")
