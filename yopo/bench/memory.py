"""Peak memory of one call above what was allocated before it.

On CUDA the allocator reports it. On CPU ``ru_maxrss`` is of no use: it never falls, so the second
of two models would seem to need nothing. There the torch profiler records every allocation and
release of torch's CPU allocator, and the peak is the largest running sum. That is exact for tensors
and the scratch memory of torch's operators; buffers internal to MKL or oneDNN are not included.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from yopo.bench.prompt import Prompt
from yopo.support.out_of_memory import memory_for

CPU, CUDA = "sum of torch's CPU allocations (profiler)", "torch.cuda.max_memory_allocated"


def measured_by(*devices: torch.device) -> str | None:
    """How memory is measured on devices; None if it is not."""
    kinds = {device.type for device in devices}
    return {"cpu": CPU, "cuda": CUDA}.get(kinds.pop()) if len(kinds) == 1 else None


def peak_bytes(call: Callable[[], object], *devices: torch.device) -> int | None:
    """Most bytes that ``call`` holds at a time, including its return value.

    Returns:
        Bytes, the sum of each device's most; None where they cannot be measured on the devices.
    """
    how = measured_by(*devices)
    if how == CUDA:
        before = 0
        for device in devices:
            torch.cuda.synchronize(device)
            before += torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        call()
        for device in devices:
            torch.cuda.synchronize(device)
        return sum(map(torch.cuda.max_memory_allocated, devices)) - before
    if how != CPU:
        return None
    with _silent_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        kept = call()
    del kept
    events = [each for each in profiler.kineto_results.events() if each.name() == "[memory]"]
    events.sort(key=lambda each: each.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory_to_time(prompt: Prompt, *options: str | None) -> AbstractContextManager[None]:
    """Say which options help if forwards of a prompt need more memory than there is.

    Args:
        prompt: The batch that is timed.
        options: Those that help beside smaller prompts.
    """
    prompts = f"{prompt.batch} prompt{'s' * (prompt.batch > 1)} of {prompt.length} tokens"
    fewer = "a smaller --batch" if prompt.batch > 1 else None
    return memory_for(f"timing {prompts}", fewer, *options, "fewer --visual-tokens")


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Suppress the profiler's own messages, printed by C++."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
