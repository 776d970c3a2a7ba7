"""Reads and validates safetensors headers: the location of each tensor.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes back
to back. Baking needs byte offsets, because it copies unchanged tensors without decoding them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from yopo.support.errors import CheckpointError
from yopo.support.reading import open_regular

MAX_HEADER = 16 << 20
"""Maximum bytes of a header (100,000 tensors). Parsed, it takes twenty times as much memory."""

MAX_SIZE = 1 << 48
"""Limit of dimensions and offsets, which bounds products of sizes."""

MAX_DIMENSIONS = 16

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating-point types that weights are computed with, by their names in the format."""

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

_RETRY = "Download or copy the file again; it looks truncated or damaged."
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard; its bytes are ``[start, stop)`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint.

    Attributes:
        file: Its name inside the checkpoint directory.
        size: Its length in bytes.
        tensors: Its tensors in byte order, without gaps.
    """

    file: str
    size: int
    tensors: tuple[TensorEntry, ...]


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: Missing, unreadable, not safetensors, or shorter or longer than its
            header says.
    """
    file, size = open_regular(path, error=CheckpointError)
    try:
        with file:
            length, header = _read_json(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    data_start = 8 + length
    header.pop("__metadata__", None)
    entries = [_entry(path, name, value, data_start) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = data_start
    for entry in entries:
        if entry.start != position:
            raise _corrupt(
                path, f"tensor '{entry.name}' starts at {entry.start}, expected {position}"
            )
        position = entry.stop
    if position != size:
        difference = "shorter" if size < position else "longer"
        raise CheckpointError(
            f"{path}: is {difference} than its header states (expected {position} bytes, "
            f"found {size}).",
            remedy=_RETRY,
        )
    return Shard(path.name, size, tuple(entries))


def _read_json(path: Path, file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    first = file.read(len(_LFS_POINTER))
    if first == _LFS_POINTER:
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the weights.",
            remedy="Run `git lfs pull` in that repository, or download the model from the hub.",
        )
    if len(first) < 8:
        raise _corrupt(path, f"the file has {size} bytes, too few for a header")
    length = int.from_bytes(first[:8], "little")
    if length > min(size - 8, MAX_HEADER):
        raise _corrupt(path, f"its header claims {length} bytes, but the file has {size}")
    file.seek(8)
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from error
    except RecursionError as error:
        raise _corrupt(path, "its header nests too deeply") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return length, header


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape = str(value["dtype"]), tuple(value["shape"])
        start, stop = value["data_offsets"]
        numbers = (start, stop, *shape)
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n < MAX_SIZE for n in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"tensor '{name}' lacks dtype, shape or offsets") from error
    bits = _BITS.get(dtype)
    expected = None if bits is None else math.prod(shape) * bits // 8
    if min((start, stop - start, *shape)) < 0 or expected not in (None, stop - start):
        raise _corrupt(
            path, f"tensor '{name}' ({dtype}, {list(shape)}) claims {stop - start} bytes"
        )
    return TensorEntry(name, dtype, shape, data_start + start, data_start + stop)


def _corrupt(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: is not a valid safetensors file: {problem}.", remedy=_RETRY)
