"""Reads and checks a checkpoint directory: configuration, shards and tensor locations.

Nothing here loads the model. ``fetch`` resolves a model to such a directory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from yopo.checkpoint.decoder_tensors import DecoderTensors, find_decoder
from yopo.checkpoint.download import download
from yopo.checkpoint.headers import FLOATS, Shard, TensorEntry, read_shard
from yopo.models.family import Backbone, Family, shape_of
from yopo.models.fingerprint import SAMPLE, Samples, Source, pieces, sample, spread_digest
from yopo.models.registry import ModelSource, family_of, family_of_type, refuse_original
from yopo.plans.schema import ModelShape
from yopo.support.errors import CheckpointError
from yopo.support.reading import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_JSON = 64 << 20
"""Maximum bytes of config.json or an index; that of a thousand shards takes a tenth of it."""

_HUB_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"),
    *("LICENSE*", "NOTICE*", "README.md"),
    "yopo_plan*.yaml",
)

_DERIVED = ("inv_freq", "position_ids")
"""Buffers that some versions of a layout store: computed from config.json, not weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint directory.

    Attributes:
        path: The directory.
        raw_config: config.json as plain values.
        config: config.json as parsed by transformers.
        family: Model family.
        backbone: Names of the decoder's parts.
        shape: The decoder's dimensions.
        shards: Its safetensors files.
        is_indexed: Whether ``model.safetensors.index.json`` names the shards.
        decoder: The decoder's tensors: (layer, name inside it) -> entry.
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
        """Read and check a directory's configuration and safetensors headers.

        Raises:
            CheckpointError: A file is missing, damaged or unsuitable, or a tensor does not match
                the configuration.
            ModelError: The family or its text decoder is not supported.
        """
        path = Path(path)
        raw_config = read_config(path)
        config = _parse_config(path, raw_config)
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
    """Fingerprint of a checkpoint's files (see ``models.fingerprint``)."""
    return read_source(checkpoint).fingerprint


def read_source(checkpoint: Checkpoint) -> Source:
    """Fingerprint of a checkpoint's files, and samples to recognize a model loaded from them.

    Reads a few hundred bytes of every tensor.
    """
    keys = {entry.name: key for key, entry in checkpoint.decoder.items()}
    samples: Samples = []
    spread = []
    for shard in checkpoint.shards:
        with (checkpoint.path / shard.file).open("rb", buffering=0) as file:
            for entry in shard.tensors:
                if entry.name in keys:
                    layer, name = keys[entry.name]
                    samples.append((f"layers.{layer}.{name}", entry.shape, _sample(file, entry)))
                if entry.dtype in FLOATS and not entry.name.endswith(_DERIVED):
                    places = pieces(math.prod(entry.shape))
                    spread.append((entry.shape, _read_values(file, entry, places)))
    return Source(samples, spread_digest(spread))


def _sample(file: BinaryIO, entry: TensorEntry) -> torch.Tensor:
    # `sample` takes the start of the first row and the end of the last. A matrix of only these two
    # pieces has the same sample as the tensor, and as a vector.
    count = min(SAMPLE, entry.shape[-1])
    ends = [(0, count), (math.prod(entry.shape) - count, count)]
    return sample(_read_values(file, entry, ends).view(2, count))


def _read_values(
    file: BinaryIO, entry: TensorEntry, places: Iterable[tuple[int, int]]
) -> torch.Tensor:
    """(values,) of a tensor at places (first value, number of values), concatenated."""
    dtype = FLOATS[entry.dtype]
    data = bytearray()
    for start, count in places:
        file.seek(entry.start + start * dtype.itemsize)
        data += file.read(count * dtype.itemsize)
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def fetch(
    source: ModelSource,
    *,
    takes_original: bool = False,
    subfolder: str = "",
    **options: Any,
) -> Path:
    """The directory of a model: a local one, or a hub repository downloaded to the cache.

    Args:
        source: From ``models.registry.resolve``.
        takes_original: Whether a checkpoint that ``yopo convert`` has to convert is accepted.
        subfolder: Folder inside the directory or repository that holds the model.
        **options: Download options, by their names in transformers: ``HUB_OPTIONS``.

    Raises:
        ModelError: The repository or revision is unknown or gated, or the hub is unreachable; or
            the model has to be converted first (checked before its weights are downloaded).
        CheckpointError: Its weights are quantized (checked as early).
    """
    if not takes_original:
        folder = fetch_some(source, ("config.json",), subfolder=subfolder, **options)
        config = _config_or_nothing(folder)
        name = str(folder) if source.is_local else source.name
        refuse_original(config.get("model_type"), name)
        refuse_quantized(config, name)
    return fetch_some(source, _HUB_FILES, subfolder=subfolder, **options)


def fetch_some(
    source: ModelSource, files: Sequence[str], *, subfolder: str = "", **options: Any
) -> Path:
    """Like :func:`fetch`, but only for files with these patterns, and without checks."""
    if source.is_local:
        return Path(source.location) / subfolder
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    return download(source, tuple(prefix + file for file in files), **options) / subfolder


def _config_or_nothing(folder: Path) -> dict[str, Any]:
    """config.json; empty if it cannot be read (later steps report it)."""
    try:
        return _read_json(folder / "config.json")
    except CheckpointError:
        return {}


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory as plain values.

    Raises:
        CheckpointError: There is none, or the weights are packed or an adapter.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory.")
    config = _read_json(path / "config.json", remedy="Give the directory of a complete model.")
    refuse_quantized(config, str(path))
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path}: holds an adapter (adapter_config.json), which a plan cannot reorder.",
            remedy="Merge it into the model first, for example with PEFT's merge_and_unload().",
        )
    return config


def refuse_quantized(config: Mapping[str, Any], name: str) -> None:
    """Refuse a checkpoint whose config.json declares packed weights (FP8, AWQ, GPTQ, ...).

    Raises:
        CheckpointError: It is one.
    """
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if settings:
            method = settings.get("quant_method") if isinstance(settings, Mapping) else None
            raise CheckpointError(
                f"{name}: its weights are quantized ({method or 'quantization_config'}); packed "
                "weights can be neither measured nor reordered.",
                remedy="Use the unquantized checkpoint, and quantize the pruned model: "
                "yopo.load(..., quantization_config=...).",
            )


def _parse_config(path: Path, raw_config: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        # False, not unset: unset would prompt the user whether to run the checkpoint's code.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; all mean the same to a user
        if "trust_remote_code" in str(error):  # custom class: none of the families
            family_of_type(str(raw_config.get("model_type")))
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
        CheckpointError: A file is missing or damaged, or the index does not match the files.
    """
    # The same precedence as in transformers: a single file takes precedence over an index.
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
                f"{path / INDEX_FILE}: lists tensor '{name}' in {file}, which does not contain it.",
                remedy="Index and shards are from different downloads; download all of them again.",
            )
    return shards, True


def _named_shard(path: Path, file: str) -> Shard:
    # With a path, the copy could write outside of its directory.
    if Path(file).name != file or not file.isprintable():
        raise CheckpointError(f"{path / INDEX_FILE}: '{file}' is not a plain file name.")
    if len(os.fsencode(file)) > 255 or not (path / file).exists():
        raise CheckpointError(
            f"{path / file}: this shard is missing, but {INDEX_FILE} lists it.",
            remedy="Download the checkpoint again; the download was incomplete.",
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
