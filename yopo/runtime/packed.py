"""Parts of quantized weights (torchao's packed tensor subclasses), for visual tokens.

A linear layer with such a weight works as it is, but a part of it has to be sliced. The part stays
packed where the packing can be sliced; otherwise it is unpacked once: more memory, same numbers.
"""

from __future__ import annotations

import torch

from yopo.models.fingerprint import is_plain

_REFUSALS = (NotImplementedError, RuntimeError, AssertionError, ValueError, IndexError, TypeError)
"""Raised by torchao's subclasses for operations that they do not support."""


def unpacked(weight: torch.Tensor) -> torch.Tensor:
    """The values of a weight, detached and dequantized if it is packed."""
    weight = weight.detach()
    return weight if is_plain(weight) else weight.dequantize()


class PackedPart:
    """Rows or columns of a packed weight, cut once and reused until the weight is replaced.

    Args:
        keep: The kept rows or columns, in their order of use.
        columns: Whether they are columns.
    """

    def __init__(self, keep: torch.Tensor, *, columns: bool):
        self._keep, self._columns = keep, columns
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # a weight and its part

    def cut(self, weight: torch.Tensor) -> torch.Tensor:
        """(kept, inputs) or (outputs, kept): packed if the packing can be cut, else its values."""
        last = self._last
        if last is None or last[0] is not weight or last[1].device != weight.device:
            last = self._last = (weight, self._cut(weight.detach()))
        return last[1]

    def _cut(self, weight: torch.Tensor) -> torch.Tensor:
        axis = 1 if self._columns else 0
        values = weight.dequantize().index_select(axis, self._keep.to(weight.device))
        first, count = int(self._keep[0]), len(self._keep)
        if not torch.equal(self._keep, torch.arange(first, first + count)):
            return values
        try:
            part = weight[:, first : first + count] if axis else weight[first : first + count]
            is_right = torch.equal(part.dequantize(), values)
            torch.nn.functional.linear(values.new_zeros(1, values.shape[1]), part)
        except _REFUSALS:
            return values
        return part if is_right else values
