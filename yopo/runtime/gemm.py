"""Matrix products by the kernel that is fast at the row counts that pruning leaves.

Text runs in separate products of few rows. MKL's float32 product, which torch's ``linear`` uses,
repacks the weight in every call, which does not pay off for few rows; oneDNN's multiplies a plain
weight in place. MKL / oneDNN in GFLOP/s on one thread of an AMD EPYC with AVX-512, medians of
alternating runs:

| weight | 1 row | 4 | 16 | 64 | 128 | 256 | 640 | 2880 |
|---|---|---|---|---|---|---|---|---|
| 11008x4096 | 12 / 12 | 16 / 28 | 43 / 66 | 75 / 98 | 87 / 106 | 95 / 108 | 101 / 107 | 98 / 106 |
| 4096x11008 | 13 / 11 | 20 / 26 | 50 / 63 | 82 / 96 | 92 / 105 | 99 / 110 | 102 / 107 | 97 / 106 |
| 4096x4096 | 12 / 13 | 20 / 28 | 50 / 65 | 82 / 98 | 92 / 106 | 97 / 111 | 102 / 108 | 94 / 106 |
| 896x896 | 25 / 24 | 40 / 41 | 74 / 79 | 94 / 103 | 99 / 107 | 102 / 110 | 104 / 110 | 101 / 110 |
| 128x128 | 6 / 2 | 18 / 7 | 46 / 22 | 75 / 54 | 87 / 71 | 93 / 87 | 97 / 100 | 99 / 107 |

So one row (a decode step) and small weights stay with MKL. A non-contiguous weight (the kept
columns of a down projection) must not reach oneDNN directly: it falls back to a loop, a thousand
times slower. Given enough rows to pay for it, its rows are copied a few at a time into a buffer
that fits the CPU cache: 94 to 98 GFLOP/s at 576 rows against MKL's 86, and no gain at 64 rows,
where it stays with MKL.

The dense model is left on MKL, as transformers has it. So a pruned prefill gains from its kernel as
well as from its plan, and `yopo bench` separates the two: :func:`same_gemm` runs a dense model on
this kernel, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from yopo.models.stock import StockDecoder

MIN_ROWS = 2
"""Fewest input rows for oneDNN."""

MIN_WEIGHT = 1 << 20
"""Fewest entries of a weight for oneDNN."""

MIN_ROWS_TO_COPY = 256
"""Fewest input rows for which a non-contiguous weight is copied for oneDNN."""

COPY_BYTES = 8 << 20
"""Bytes of such a weight copied at a time."""


def fast_gemm(layers: nn.ModuleList, hidden: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which float32 ``linear`` of more than one row runs on the faster kernel.

    It only changes rounding. It does nothing, at no cost, in decode steps of one prompt, on models
    too small to gain, where gradients are needed, off the CPU, in other dtypes, under autocast and
    ``torch.compile``, while a dispatch mode (such as a FLOP counter) is active, and where torch
    lacks the kernel.

    Args:
        layers: The decoder layers that will run.
        hidden: (batch, length, hidden), their input.
    """
    rows = hidden.shape[0] * hidden.shape[1]
    if rows < MIN_ROWS or not _applies(hidden) or not len(layers):
        return nullcontext()
    if all(weight.numel() < MIN_WEIGHT for weight in layers[0].parameters()):
        return nullcontext()
    kernel = _kernel()
    return nullcontext() if kernel is None else _PlainWeights(kernel)


@contextmanager
def same_gemm(decoder: nn.Module) -> Iterator[None]:
    """Run a dense decoder's forwards inside the block on the kernel that a pruned one would use.

    The remaining difference between the two is what pruning itself saves. See :func:`fast_gemm`.
    """
    stack = ExitStack()

    def enter(module: StockDecoder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("inputs_embeds", args[0] if args else None)
        if hidden is not None and hidden.is_floating_point():
            stack.enter_context(fast_gemm(module.layers, hidden))

    handles = (
        decoder.register_forward_pre_hook(enter, with_kwargs=True),
        decoder.register_forward_hook(lambda *_: stack.close(), always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.close()


def _applies(hidden: torch.Tensor) -> bool:
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def _kernel() -> Callable[..., torch.Tensor] | None:
    """oneDNN's linear layer on plain weights; None where this torch has none."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class _PlainWeights(TorchFunctionMode):
    """Sends the ``linear`` calls that gain to another kernel; all else passes through."""

    def __init__(self, kernel: Callable[..., torch.Tensor]):
        super().__init__()
        self._kernel = kernel

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called for every torch function inside the context."""
        if func is linear and not kwargs and _gains(*args[:2]):
            return self._product(*args)
        return func(*args, **(kwargs or {}))

    def _product(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weight.is_contiguous():
            return self._kernel(inputs, weight, bias, "none", [], "")
        outputs, width = weight.shape
        step = max(1, COPY_BYTES // (width * weight.element_size()))
        found = inputs.new_empty(*inputs.shape[:-1], outputs)
        room = weight.new_empty(min(step, outputs), width)
        for start in range(0, outputs, step):
            some = slice(start, min(start + step, outputs))
            part = room[: some.stop - some.start].copy_(weight[some])
            own = None if bias is None else bias[some]
            found[..., some] = self._kernel(inputs, part, own, "none", [], "")
        return found


def _gains(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    least = MIN_ROWS if weight.is_contiguous() else MIN_ROWS_TO_COPY
    return (
        weight.numel() >= MIN_WEIGHT
        and inputs.numel() >= least * inputs.shape[-1]
        and weight.dtype == inputs.dtype == torch.float32
        and weight.stride(-1) == 1
        and weight.device.type == inputs.device.type == "cpu"
    )
