"""The precision of a model that is loaded onto a CPU, where float16 is slow.

CPUs have no float16 products worth the name: torch's take three times as long as float32 ones. So
``auto`` loads a float16 checkpoint in another precision: bfloat16 where the processor multiplies it
in hardware, float32 elsewhere, if that fits. The processor's flags decide rather than a timing, so
that a command gives the same plan whenever it is run on a machine. GFLOP/s of products of 64 and
512 rows with a 2048x2048 weight, one thread of a processor with AVX512-BF16: bfloat16 185 and 116,
float32 47 and 44, float16 12 and 12.
"""

from __future__ import annotations

import torch

from yopo.checkpoint.reader import Checkpoint
from yopo.support.console import note
from yopo.support.memory import available_bytes
from yopo.support.ranks import least

MARGIN = 1.2
"""Memory to be free over the weights' bytes in float32."""


def has_fast_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def dtype_for(asked: torch.dtype | str, checkpoint: Checkpoint, device: str) -> torch.dtype | str:
    """The dtype to load a checkpoint in; says so if it is not the checkpoint's own.

    Args:
        asked: The requested one; only ``auto`` is ever replaced.
        checkpoint: What is loaded.
        device: Where it will run.
    """
    if asked != "auto" or torch.device(device).type != "cpu" or not _is_float16(checkpoint):
        return asked
    if has_fast_bfloat16():
        return _instead(torch.bfloat16)
    needed, free = 2 * checkpoint.num_bytes, least(available_bytes())
    if free is None or MARGIN * needed <= free:
        return _instead(torch.float32)
    note(
        f"The checkpoint's float16 is slow on a CPU, but float32 needs {needed / 1e9:.1f} GB and "
        f"only {free / 1e9:.1f} GB are free: it is loaded as it is."
    )
    return asked


def _instead(found: torch.dtype) -> torch.dtype:
    name = str(found).removeprefix("torch.")
    note(f"The checkpoint's float16 is slow on a CPU: loaded in {name} (--dtype float16 keeps it).")
    return found


def _is_float16(checkpoint: Checkpoint) -> bool:
    """Whether transformers would load it in float16: by its configuration, else its weights."""
    named = getattr(checkpoint.config, "dtype", None)
    if named is not None:
        return named in (torch.float16, "float16")
    bytes_of = {"F16": 0, "other": 0}
    for entry in checkpoint.tensors.values():
        bytes_of["F16" if entry.dtype == "F16" else "other"] += entry.num_bytes
    return bytes_of["F16"] > bytes_of["other"]
