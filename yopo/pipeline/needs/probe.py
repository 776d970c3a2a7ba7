"""What an estimate has to look at: some prompts, and how fast a device multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache
from statistics import mean, median
from typing import Any

import torch
from transformers import PreTrainedConfig, ProcessorMixin

from yopo.data.pairs import Pair
from yopo.data.processing import processed
from yopo.data.prompts import prompt_text
from yopo.data.sizes import pixels_of
from yopo.data.split import pick
from yopo.models.registry import family_of
from yopo.pipeline.needs.duration import Speed
from yopo.pipeline.needs.job import Prompts
from yopo.plans.schema import ModelShape
from yopo.support.errors import DataError

PROBED = 8
"""Prompts that are processed to learn their sizes: from the smallest images to the largest."""

PATIENCE = 0.08
"""Seconds after which a rate is known; four are measured."""

PER_LAYER = {"cpu": 1e-3}
"""Seconds that a layer's call takes beside what it computes; elsewhere, starting kernels counts."""

SOLVING = {"cpu": 2.0}
"""Time of solves over that of products with their FLOPs; elsewhere, much more."""

WIDEST = 1024
"""Width of the square matrices by which rates in float32 and float64 are measured."""


def prompts_of(
    pairs: Iterable[Pair], processor: ProcessorMixin, config: PreTrainedConfig, keep: float = 1.0
) -> Prompts | None:
    """Sizes of some pairs' prompts, from a few of them; None if none can be made.

    Args:
        pairs: All; read twice.
        processor: The model's.
        config: The model's configuration.
        keep: Share of the visual tokens that a reduction leaves.
    """
    chosen = _spread([(pixels_of(pair), len(pair.question)) for pair in pairs])
    ids = torch.tensor(family_of(config).token_ids(config))
    lengths, visual, pixels, times = [], [], [], []
    for pair in pick(pairs, chosen):
        started = time.thread_time()
        try:
            made = processed(processor, [prompt_text(processor, pair)], [pair])
        except (ValueError, DataError):  # whoever needs it says what is wrong
            continue
        times.append(time.thread_time() - started)
        count = int(torch.isin(made["input_ids"], ids).sum())
        visual.append(keep * count)
        lengths.append(made["input_ids"].shape[1] - (1 - keep) * count)
        found = (each for name, each in made.items() if name.startswith("pixel_values"))
        pixels.append(sum(each.numel() for each in found))
    if not times:
        return None
    patches = mean(pixels) / _patch(config)
    # The first prompt waits for imports.
    return Prompts(max(lengths), mean(lengths), mean(visual), patches, median(times))


def _patch(config: PreTrainedConfig) -> int:
    """Numbers of the vision tower's input that make a patch, by whatever names there are."""
    vision: Any = config.vision_config
    size = vision.patch_size
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    return int(high * wide * channels * (getattr(vision, "temporal_patch_size", None) or 1))


def _spread(sizes: list[tuple[float, int]]) -> frozenset[int]:
    """Numbers of pairs whose sizes are spread evenly, the largest among them."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    count = min(PROBED, len(order))
    return frozenset(order[(place + 1) * len(order) // count - 1] for place in range(count))


@cache
def speed_on(
    device: torch.device, dtype: torch.dtype, shape: ModelShape, rows: int, few: int
) -> Speed:
    """How fast a device is, from products at a model's width, in less than half a second.

    Args:
        device: The device.
        dtype: The model's.
        shape: The decoder's dimensions.
        rows: Tokens of a batch.
        few: Rows of a batch in a decode step.
    """
    weight = torch.ones(shape.ffn, shape.hidden, dtype=dtype, device=device)
    inputs = torch.ones(rows, shape.hidden, dtype=dtype, device=device)
    width = min(WIDEST, shape.hidden)
    square = torch.ones(width, width, dtype=torch.float32, device=device)
    home = "cpu" if device.type == "mps" else device  # has no float64
    double = square.to(home, torch.float64)
    thin, some = inputs[:few], _enough_rows(inputs, weight)
    solving = SOLVING.get(device.type, 20.0) * _seconds(lambda: double @ double, device)
    return Speed(
        products=2 * some.shape[0] * weight.numel() / _seconds(lambda: some @ weight.T, device),
        moments=2 * width**3 / _seconds(lambda: square @ square, device),
        solves=2 * width**3 / solving,
        per_weight=_seconds(lambda: thin @ weight.T, device) / weight.numel(),
        per_layer=PER_LAYER.get(device.type, 2e-3),
    )


def _enough_rows(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As many rows as pass a weight well within ``PATIENCE``, by how long a few take."""
    few = inputs[:16]
    took = _seconds(lambda: few @ weight.T, inputs.device) / len(few)
    return inputs[: max(16, int(PATIENCE / 4 / took))]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a call among those of ``PATIENCE``."""

    def now() -> float:
        if device.type == "cpu":  # without the time that others have the processor
            return time.thread_time()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    best, until = float("inf"), time.perf_counter() + PATIENCE
    while best == float("inf") or time.perf_counter() < until:
        started = now()
        call()
        took = now() - started
        if took > 0:  # a virtual machine's clock may stand still as its host gives it no time
            best = min(best, took)
    return best
