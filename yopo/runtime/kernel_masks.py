"""Masks in the form that a device's attention kernel takes."""

from __future__ import annotations

import torch

from yopo.runtime import few_calls

ALIGNMENT = 16
"""Numbers to a multiple of which rows of a mask are spaced."""


class KernelMasks:
    """Bool masks of one forward, converted once for all of its layers.

    Args:
        device: Where the attention runs.

    Attributes:
        in_few_calls: Whether the device prefers few calls: masks then become numbers to be added.
            torch would make them in every call, and copy them again where rows are not aligned.
    """

    def __init__(self, device: torch.device):
        self.in_few_calls = few_calls.preferred_on(device)
        self._added: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, mask: torch.Tensor | None, queries: torch.Tensor) -> torch.Tensor | None:
        """A bool mask, or None, for attention of these queries."""
        if mask is None or not self.in_few_calls:
            return mask
        if id(mask) not in self._added:
            *sizes, width = mask.shape
            room = queries.new_zeros(*sizes, -(-width // ALIGNMENT) * ALIGNMENT)
            added = room[..., :width].masked_fill_(~mask, float("-inf"))
            self._added[id(mask)] = mask, added  # the mask is held, so its id stays its own
        return self._added[id(mask)][1]
