"""Prefill time, dense against pruned: paired runs in one process, medians, as a ratio.

Only the text decoder is timed (the part that a plan changes), inside ordinary forwards of the whole
model; vision encoder and language-model head are the same in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from transformers import PreTrainedModel

from yopo.data.prompts import Batch
from yopo.models.devices import device_of, devices_of

Switch = AbstractContextManager[object]


@dataclass(frozen=True)
class PrefillTime:
    """Medians over paired runs.

    Attributes:
        dense_ms, pruned_ms: Decoder time per batch.
        ratio: Median of the pairs' own ratios, pruned over dense.
        runs: Number of pairs.
        batch_size: Prompts per batch.
    """

    dense_ms: float
    pruned_ms: float
    ratio: float
    runs: int
    batch_size: int


def now(*devices: torch.device) -> float:
    """The time in milliseconds, once all work queued on the devices is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


@contextmanager
def _stopwatch(model: PreTrainedModel) -> Iterator[list[float]]:
    """Collect the decoder's milliseconds of every forward inside the block."""
    decoder, times, started = model.get_decoder(), [], []
    devices = devices_of(model)
    handles = (
        decoder.register_forward_pre_hook(lambda module, args: started.append(now(*devices))),
        decoder.register_forward_hook(
            lambda module, args, output: times.append(now(*devices) - started.pop())
        ),
    )
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def time_prefill(
    model: PreTrainedModel,
    batch: Batch,
    prune: Callable[[], Switch],
    *,
    runs: int = 15,
    warmup: int = 3,
) -> PrefillTime:
    """Time prefill of one batch, dense and pruned in turn.

    Args:
        model: A dense model in memory.
        batch: The batch to prefill, wherever its tensors are.
        prune: Makes the context manager under which the model is pruned.
        runs: Counted pairs.
        warmup: Uncounted pairs before those.
    """

    batch = batch.to(device_of(model))

    def prefill() -> float:
        with _stopwatch(model) as times:
            model(**batch.inputs, use_cache=True, logits_to_keep=1)
        return times[0]

    dense, pruned = [], []
    for _ in range(warmup + runs):
        dense.append(prefill())
        with prune():
            pruned.append(prefill())
    dense, pruned = dense[warmup:], pruned[warmup:]
    ratio = median(after / before for before, after in zip(dense, pruned, strict=True))
    return PrefillTime(median(dense), median(pruned), ratio, runs, len(batch))
