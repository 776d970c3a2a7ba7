"""The machine's speed: plain products with the model's largest weight, on the same kernels.

This bounds a prefill or a decode step, if it consisted only of products. It is measured in every
round, so that rates and times are from the same minutes; the best round counts, as the machine was
just busy in the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear

from yopo.bench.result import Rates
from yopo.evaluation.timing import now
from yopo.runtime.gemm import fast_gemm
from yopo.support.errors import ModelError

REPEATS = 2


@torch.no_grad()
def measure_rates(layers: nn.ModuleList, batch: int, length: int) -> Rates:
    """Time products of ``batch`` times ``length`` rows, and of ``batch`` rows in every layer.

    Of layers on several devices, those on the first one count.

    Raises:
        ModelError: No layer is on a device.
    """
    largest = [max(layer.parameters(), key=torch.Tensor.numel) for layer in layers]
    places = [each.device for each in largest if not each.is_meta]
    if not places:
        raise ModelError(
            "No layer of the decoder is on a device, so the device's speed cannot be measured.",
            remedy="Use a device map that keeps some layers in memory.",
        )
    weights = [each for each in largest if each.device == places[0]]
    work = 2 * batch * length * weights[0].numel()
    size = sum(weight.nbytes for weight in weights)
    return Rates(
        work / _milliseconds(layers, weights[:1], batch, length),
        size / _milliseconds(layers, weights, batch, 1),
    )


def best(rates: list[Rates]) -> Rates:
    """The fastest of several measurements."""
    return Rates(max(each.flops for each in rates), max(each.bytes for each in rates))


def _milliseconds(
    layers: nn.ModuleList, weights: Sequence[torch.Tensor], batch: int, length: int
) -> float:
    inputs = weights[0].new_ones(batch, length, weights[0].shape[1])
    times = []
    for _ in range(REPEATS):
        started = now(inputs.device)
        with fast_gemm(layers, inputs):
            for weight in weights:
                linear(inputs, weight)
        times.append(now(inputs.device) - started)
    return min(times)
