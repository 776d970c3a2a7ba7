"""A checkpoint directory as data: configuration, shards and where every tensor lies, all checked.

Nothing here loads the model. ``fetch`` turns a model's name into such a directory.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from yopo import console
from yopo.checkpoint.decoder import DecoderTensors, find_decoder
from yopo.checkpoint.headers import Shard, TensorEntry, read_shard
from yopo.errors import CheckpointError, ModelError
from yopo.families.family import Backbone, Family, shape_of
from yopo.families.fingerprint import SAMPLE, digest, sample
from yopo.families.registry import ModelSource, family_of, refuse_original
from yopo.plan import ModelShape
from yopo.reading import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_JSON = 64 << 20
"""Bytes of config.json or of an index; those of a thousand shards have a tenth."""

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
_HUB_FILES += ("LICENSE*", "NOTICE*", "README.md")
_HUB_SKIPPED = ("consolidated*", "original/*", "onnx/*")  # the same weights in other formats

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint directory.

    Attributes:
        path: The directory.
        raw_config: config.json as it stands.
        config: The same, understood by transformers.
        family: Model family.
        backbone: Names of the decoder's parts.
        shape: The decoder's dimensions.
        shards: Its safetensors files.
        is_indexed: Whether ``model.safetensors.index.json`` names the shards.
        decoder: Where the decoder's tensors lie: (layer, name inside it) -> entry.
    """

    path: Path
    raw_config: dict[str, Any]
    config: PreTrainedConfig
    family: Family
    backbone: Backbone
    shape: ModelShape
    shards: tuple[Shard, ...]
    is_indexed: bool
    decoder: DecoderTensors

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read a directory's configuration and safetensors headers, and check all of it.

        Raises:
            CheckpointError: A file is missing, damaged or unsuitable, or a tensor is not what
                the configuration says.
            ModelError: The family or its text decoder is not supported.
        """
        path = Path(path)
        raw_config = read_config(path)
        config = _parse_config(path)
        family = family_of(config)
        backbone, shape = family.backbone(config), shape_of(config)
        shards, is_indexed = read_shards(path)
        entries = [entry for shard in shards for entry in shard.tensors]
        decoder = find_decoder(path, entries, backbone, shape)
        return cls(path, raw_config, config, family, backbone, shape, shards, is_indexed, decoder)

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """All tensors by name."""
        return {entry.name: entry for shard in self.shards for entry in shard.tensors}

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.size for shard in self.shards)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Fingerprint of a checkpoint; equal to ``fingerprint_of_decoder`` of the loaded model.

    Reads a few bytes of every decoder tensor.
    """
    keys = {entry.name: key for key, entry in checkpoint.decoder.items()}
    samples = []
    for shard in checkpoint.shards:
        with (checkpoint.path / shard.file).open("rb") as file:
            for entry in shard.tensors:
                if entry.name in keys:
                    layer, name = keys[entry.name]
                    samples.append((f"layers.{layer}.{name}", entry.shape, _sample(file, entry)))
    return digest(samples)


def _sample(file: BinaryIO, entry: TensorEntry) -> torch.Tensor:
    # `sample` takes the start of the first row and the end of the last. A matrix of just these
    # two pieces has the same sample as the tensor, and as a vector that is one row.
    dtype = _DTYPES[entry.dtype]
    count = min(SAMPLE, entry.shape[-1])
    num_bytes = count * dtype.itemsize
    pieces = bytearray()
    for offset in (entry.start, entry.stop - num_bytes):
        file.seek(offset)
        pieces += file.read(num_bytes)
    return sample(torch.frombuffer(pieces, dtype=dtype).view(2, count))


def fetch(source: ModelSource, *, takes_original: bool = False) -> Path:
    """The directory of a model: a local one as it is, a hub repository downloaded to the cache.

    Args:
        source: From ``families.registry.resolve``.
        takes_original: Whether it may be a checkpoint that ``yopo convert`` has to convert.

    Raises:
        ModelError: The repository or revision is unknown, gated, or the hub is out of reach; or
            the model has to be converted first (said before its weights are downloaded).
    """
    if source.is_local:
        folder = Path(source.location)
    elif takes_original:
        return _download(source, _HUB_FILES)
    else:
        folder = _download(source, ("config.json",))
    if not takes_original:
        name = source.location if source.is_local else source.name
        refuse_original(_model_type(folder), name)
    return folder if source.is_local else _download(source, _HUB_FILES)


def _model_type(folder: Path) -> str | None:
    """What config.json says; None where there is none that could say it (others complain)."""
    try:
        return _read_json(folder / "config.json").get("model_type")
    except CheckpointError:
        return None


def _download(source: ModelSource, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = source.location + (f"@{source.revision}" if source.revision else "")
    try:
        known = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
        if not isinstance(known, str):
            console.note(f"{name}: looking on the Hugging Face hub (-v shows its progress).")
        folder = snapshot_download(
            source.location,
            revision=source.revision,
            allow_patterns=list(files),
            ignore_patterns=list(_HUB_SKIPPED),
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name}: is gated on the Hugging Face hub.",
            remedy="Accept its conditions on its hub page, then log in with `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        what = "revision" if isinstance(error, RevisionNotFoundError) else "model"
        raise ModelError(
            f"{name}: the Hugging Face hub knows no such {what}.",
            remedy="Check the spelling; a private model needs `hf auth login`.",
        ) from error
    except (HTTPError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # this machine's trouble: disk full, say
            raise ModelError(f"{name}: cannot be downloaded: {error}.") from error
        raise ModelError(
            f"{name}: is not (completely) in the local cache, and the Hugging Face hub cannot be "
            "reached.",
            remedy="Check the network (and HF_HUB_OFFLINE), or give a local model directory.",
        ) from error
    return Path(folder)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory as it stands.

    Raises:
        CheckpointError: There is none, or it is of packed weights or an adapter.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory.")
    config = _read_json(path / "config.json", remedy="Give the directory of a whole model.")
    if any("quantization_config" in part for part in (config, config.get("text_config") or {})):
        raise CheckpointError(
            f"{path / 'config.json'}: has a quantization_config; packed weights cannot be "
            "reordered.",
            remedy="Apply the plan to the unquantized checkpoint, then quantize the result.",
        )
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path}: holds an adapter (adapter_config.json), which a plan cannot reorder.",
            remedy="Merge it into the model first, for example with PEFT's merge_and_unload().",
        )
    return config


def _parse_config(path: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        # False, not unset: unset would ask the user whether to run the checkpoint's code.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here; all mean the same to a user
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path / 'config.json'}: transformers cannot read it: {reason}",
            remedy="Use the transformers-format repository of the model (often named ...-hf).",
        ) from error


def _read_json(path: Path, *, remedy: str | None = None) -> dict[str, Any]:
    try:
        data = json.loads(read_bytes(path, limit=MAX_JSON, error=CheckpointError))
    except CheckpointError as error:
        raise CheckpointError(error.message, remedy=remedy or error.remedy) from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: nests too deeply.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object.")
    return data


def read_shards(path: Path) -> tuple[tuple[Shard, ...], bool]:
    """The checked headers of a checkpoint's safetensors files, and whether an index names them.

    Raises:
        CheckpointError: A file is missing or damaged, or the index is not of these files.
    """
    # The same precedence as in transformers: a single file hides an index.
    if (path / SINGLE_FILE).exists():
        return (read_shard(path / SINGLE_FILE),), False
    if not (path / INDEX_FILE).exists():
        raise _no_weights(path)
    weight_map = _read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_FILE}: lacks the mapping 'weight_map'.")
    shards = tuple(_named_shard(path, file) for file in sorted({*map(str, weight_map.values())}))
    held: dict[str, str] = {}
    for shard in shards:
        for entry in shard.tensors:
            if entry.name in held:
                raise CheckpointError(
                    f"{path}: tensor '{entry.name}' is in two shards, {held[entry.name]} and "
                    f"{shard.file}."
                )
            held[entry.name] = shard.file
    for name, file in weight_map.items():
        if held.get(name) != file:
            raise CheckpointError(
                f"{path / INDEX_FILE}: names tensor '{name}' in {file}, which does not hold it.",
                remedy="Index and shards are of different downloads; download all of them again.",
            )
    return shards, True


def _named_shard(path: Path, file: str) -> Shard:
    if (
        Path(file).name != file or not file.isprintable()
    ):  # a path would let the copy write outside its directory
        raise CheckpointError(f"{path / INDEX_FILE}: '{file}' is not a plain file name.")
    if len(os.fsencode(file)) > 255 or not (path / file).exists():
        raise CheckpointError(
            f"{path / file}: this shard is missing, but {INDEX_FILE} names it.",
            remedy="Download the checkpoint again; the download was not complete.",
        )
    return read_shard(path / file)


def _no_weights(path: Path) -> CheckpointError:
    pickles = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)
    )
    found = f"only {pickles[0]}" if pickles else "no weights at all"
    return CheckpointError(
        f"{path}: has neither {SINGLE_FILE} nor {INDEX_FILE}, {found}.",
        remedy="Load the model in transformers and re-save it with save_pretrained(), which "
        "writes safetensors.",
    )
