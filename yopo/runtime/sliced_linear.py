"""Linear layers of visual tokens: slices of the text's own layers, or fitted ones.

A slice never stores values. Consecutive rows or columns are a view; others are gathered from the
live weight in every call (into one buffer that is reused, unless the weight itself is not kept in
memory; or, where gradients are recorded, as a differentiable copy). So whatever happens to the
text's weight - an optimizer step, an adapter, a merge, another dtype - applies to visual tokens as
well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import linear

from yopo.models.devices import device_of
from yopo.models.fingerprint import is_plain
from yopo.runtime.adapters import Adapter, parts_of
from yopo.runtime.offload import bias_of, is_fetched, weight_of
from yopo.runtime.packed import PackedPart
from yopo.support import console

if TYPE_CHECKING:
    from yopo.models.stock import Projection


class SlicedLinear(nn.Module):
    """A linear layer restricted to some outputs (rows) or some inputs (columns) of another.

    Args:
        holder: The module that the full layer is looked up in, in every call, as adapters replace
            layers. Not registered as a submodule, so state dicts do not change.
        name: The full layer's name in ``holder``.
        keep: The kept rows or columns, in their order of use.
        columns: Whether ``keep`` selects inputs rather than outputs.
        block: Length of the runs of consecutive positions that ``keep`` consists of: whole runs
            are gathered faster than single columns.
    """

    keep: torch.Tensor | None
    runs: torch.Tensor | None

    def __init__(
        self,
        holder: nn.Module,
        name: str,
        keep: torch.Tensor,
        *,
        columns: bool = False,
        block: int = 1,
    ):
        super().__init__()
        self._holder, self._name = (holder,), name
        self._columns, self._block = columns, block
        source = self.source
        first = int(keep[0])
        self._span = slice(first, first + len(keep))
        is_span = torch.equal(keep, torch.arange(self._span.start, self._span.stop))
        full = source.in_features if columns else source.out_features
        self._is_all = is_span and len(keep) == full
        self._gathered: torch.Tensor | None = None
        self._packed = PackedPart(keep, columns=columns)
        place = keep.to(device_of(source))
        self.register_buffer("keep", None if is_span else place, persistent=False)
        runs = None if is_span or not columns else place[::block] // block
        self.register_buffer("runs", runs, persistent=False)

    @property
    def source(self) -> Projection:
        """The full layer, or the adapter that wraps it."""
        return getattr(self._holder[0], self._name)

    def forward(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Apply to (..., kept inputs or all inputs) and return (..., outputs).

        Args:
            inputs: Of the kept columns, or of the full layer.
            bias: (outputs,), replaces the layer's own and the adapters'; only for slices by
                columns.
        """
        if self._is_all and bias is None:
            return self.source(inputs)
        base, adapters = parts_of(self.source, self._name)
        weight, own = self._cut(base)
        outputs = linear(inputs, weight, own if bias is None else bias)
        for adapter in adapters:
            added = self._adapted(inputs, adapter, with_bias=bias is None)
            outputs = outputs + added * adapter.scaling
        return outputs.to(weight.dtype) if adapters else outputs

    def matrix(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight, (outputs, inputs), and the bias, (outputs,) or None; without adapters."""
        return self._cut(parts_of(self.source, self._name)[0])

    def _cut(self, base: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = weight_of(base), bias_of(base)
        if not self._columns and bias is not None:
            bias = self._select(bias, 0)
        if not is_plain(weight):
            return self._packed.cut(weight), bias
        if self._columns:
            return self._take_columns(weight), bias
        if self.keep is None:
            return weight[self._span], bias
        return self._gather(weight, self.keep, 0), bias

    def _take_columns(self, weight: torch.Tensor) -> torch.Tensor:
        if self.runs is None:
            return weight[:, self._span]
        runs = weight.unflatten(1, (-1, self._block))  # (outputs, all runs, block)
        return self._gather(runs, self.runs, 1).flatten(1)

    def _gather(self, tensor: torch.Tensor, places: torch.Tensor, dim: int) -> torch.Tensor:
        if torch.is_grad_enabled() or is_fetched(parts_of(self.source, self._name)[0]):
            return tensor.index_select(dim, places)
        size = list(tensor.shape)
        size[dim] = len(places)
        found = self._gathered
        if found is None or list(found.shape) != size or not _is_like(found, tensor):
            with torch.inference_mode(False):  # else it could not be written outside inference mode
                found = self._gathered = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
        return torch.index_select(tensor, dim, places, out=found)

    def _adapted(self, inputs: torch.Tensor, adapter: Adapter, *, with_bias: bool) -> torch.Tensor:
        enter, leave = weight_of(adapter.enter), weight_of(adapter.leave)
        bias = bias_of(adapter.leave)
        inputs = adapter.drop(inputs.to(enter.dtype))
        if self._columns:
            bias = bias if with_bias else None
            return linear(linear(inputs, self._select(enter, 1)), leave, bias)
        bias = None if bias is None else self._select(bias, 0)
        return linear(linear(inputs, enter), self._select(leave, 0), bias)

    def _select(self, small: torch.Tensor, dim: int) -> torch.Tensor:
        if self.keep is None:
            return small.narrow(dim, self._span.start, self._span.stop - self._span.start)
        return small.index_select(dim, self.keep)


def _is_like(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


def like_that_of(layer: nn.Module) -> torch.Tensor:
    """An empty tensor of the dtype of a linear layer's weight, on the device it computes on."""
    return torch.empty(0, dtype=cast("Projection", layer).weight.dtype, device=device_of(layer))


class FittedLinear(nn.Module):
    """A fitted linear layer, with the dtype and device of the layer that it replaces.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,), or None.
        like: A tensor of that dtype on that device.
        trainable: Whether weight and bias are parameters rather than buffers that are not in the
            state dict.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        like: torch.Tensor,
        *,
        trainable: bool = False,
    ):
        super().__init__()
        for name, value in (("weight", weight), ("bias", bias)):
            value = None if value is None else value.detach().to(like)
            if trainable:  # a copy, because the optimizer changes it in place
                value = None if value is None else nn.Parameter(value.clone())
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=False)

    def forward(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Apply to (..., inputs) and return (..., outputs); ``bias`` is ignored."""
        return linear(inputs, self.weight, self.bias)

    def matrix(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight, (outputs, inputs), and the bias, (outputs,) or None."""
        return self.weight, self.bias


def warn_without_fitted(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, *_: object
) -> None:
    """Warn if a state dict is loaded that lacks a model's trainable fitted weights.

    Args:
        module: Holds the fitted weights.
        state_dict: The weights being loaded.
        prefix: Name prefix of ``module``'s parameters in it.
    """
    names = [f"{prefix}{name}" for name, _ in module.named_parameters()]
    if names and not any(name in state_dict for name in names):
        console.warn(
            "The loaded weights do not include the fitted weights for visual tokens, which are "
            "left unchanged. Load both with yopo.load(DIRECTORY, trainable=True)."
        )
