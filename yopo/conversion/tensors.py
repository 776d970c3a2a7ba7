"""Maps an original InternVL checkpoint's tensors to native ones, without decoding any.

Tensors are renamed and fused projections split: every new tensor is some rows of an old one, so a
shard is written by copying byte ranges. Dtypes and values do not change.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from yopo.checkpoint.headers import Shard, TensorEntry
from yopo.support.errors import CheckpointError

CHUNK = 16 * 2**20
"""Bytes per read and write."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor of ``groups`` groups of ``members`` equal blocks of rows.

    Attributes:
        groups: Number of consecutive groups.
        members: Blocks per group.
        start, stop: The blocks taken from every group.
    """

    groups: int = 1
    members: int = 1
    start: int = 0
    stop: int = 1


WHOLE = Rows()


@dataclass(frozen=True)
class NewTensor:
    """A tensor of the result, and where its bytes come from."""

    name: str
    shape: tuple[int, ...]
    source: TensorEntry
    rows: Rows

    @property
    def num_bytes(self) -> int:
        """Size of its data in bytes."""
        rows = self.rows
        return self.source.num_bytes // rows.members * (rows.stop - rows.start)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Byte ranges of the source's shard, in order."""
        rows = self.rows
        block = self.source.num_bytes // (rows.groups * rows.members)
        for group in range(rows.groups):
            first = self.source.start + group * rows.members * block
            yield first + rows.start * block, first + rows.stop * block


Parts = Mapping[str, Rows]
"""New name (a template of ``re.Match.expand``) -> rows of the old tensor."""

_TOWER = r"vision_model\.encoder\.layers\.(\d+)\."
_TOWER_LAYER = r"vision_tower.encoder.layer.\1."
_TOWER_NAMES = {
    r"attn\.proj": "attention.projection_layer",
    r"attn\.([qk])_norm": r"attention.\2_norm",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"mlp\.fc([12])": r"mlp.fc\2",
}

VISION: dict[str, Parts] = {
    r"vision_model\.embeddings\.class_embedding": {"vision_tower.embeddings.cls_token": WHOLE},
    r"vision_model\.embeddings\.position_embedding": {
        "vision_tower.embeddings.position_embeddings": WHOLE
    },
    r"vision_model\.embeddings\.patch_embedding\.(weight|bias)": {
        r"vision_tower.embeddings.patch_embeddings.projection.\1": WHOLE
    },
    _TOWER + r"ls([12])": {_TOWER_LAYER + r"lambda_\2": WHOLE},
    _TOWER + r"attn\.qkv\.(weight|bias)": {
        _TOWER_LAYER + rf"attention.{part}_proj.\2": Rows(1, 3, index, index + 1)
        for index, part in enumerate("qkv")
    },
    **{
        rf"{_TOWER}{old}\.(?P<kind>weight|bias)": {rf"{_TOWER_LAYER}{new}.\g<kind>": WHOLE}
        for old, new in _TOWER_NAMES.items()
    },
    **{
        rf"mlp1\.{index}\.(weight|bias)": {rf"multi_modal_projector.{new}.\1": WHOLE}
        for index, new in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2"))
    },
}
"""Old name (a regular expression) -> new tensors, for the tower and the projector."""

_NATIVE = {
    r"language_model\.(model\.(?:embed_tokens|norm|layers\.\d+\..+)|lm_head)\.(weight|bias)": {
        r"language_model.\1.\2": WHOLE
    },
}
"""Text decoders that use transformers' names."""


def _internlm2(kv_heads: int, group: int) -> dict[str, Parts]:
    """InternLM2's rules: a KV head's queries come before its key and its value."""
    layer, new = r"language_model\.model\.layers\.(\d+)\.", r"language_model.model.layers.\1."
    members = group + 2
    rows = {"q": (0, group), "k": (group, group + 1), "v": (group + 1, group + 2)}
    renamed = {
        r"attention\.wo": "self_attn.o_proj",
        r"feed_forward\.w1": "mlp.gate_proj",
        r"feed_forward\.w3": "mlp.up_proj",
        r"feed_forward\.w2": "mlp.down_proj",
        r"attention_norm": "input_layernorm",
        r"ffn_norm": "post_attention_layernorm",
    }
    return {
        layer + r"attention\.wqkv\.(weight|bias)": {
            rf"{new}self_attn.{part}_proj.\2": Rows(kv_heads, members, *span)
            for part, span in rows.items()
        },
        **{
            rf"{layer}{old}\.(weight|bias)": {rf"{new}{to}.\2": WHOLE}
            for old, to in renamed.items()
        },
        r"language_model\.model\.tok_embeddings\.weight": {
            "language_model.model.embed_tokens.weight": WHOLE
        },
        r"language_model\.model\.norm\.weight": {"language_model.model.norm.weight": WHOLE},
        r"language_model\.output\.weight": {"language_model.lm_head.weight": WHOLE},
    }


def rules_of(architecture: str, text: Mapping[str, Any]) -> dict[str, Parts]:
    """The new tensors of every tensor of a checkpoint.

    Args:
        architecture: Class of the original text decoder.
        text: The native text configuration.
    """
    if architecture != "InternLM2ForCausalLM":
        return VISION | _NATIVE
    kv_heads = text["num_key_value_heads"]
    return VISION | _internlm2(kv_heads, text["num_attention_heads"] // kv_heads)


def new_tensors(
    shard: Shard, rules: Mapping[str, Parts], *, skipped: frozenset[str] = frozenset()
) -> list[NewTensor]:
    """The new tensors of a shard, in the order of their sources.

    Args:
        shard: A shard of the original checkpoint.
        rules: From ``rules_of``.
        skipped: New names to leave out (a tied head).

    Raises:
        CheckpointError: A tensor is unknown, or does not consist of the expected blocks.
    """
    compiled = {re.compile(pattern): parts for pattern, parts in rules.items()}
    made = []
    for entry in shard.tensors:
        if entry.name.endswith("rotary_emb.inv_freq"):  # computed, not learned
            continue
        found = [
            (match, parts)
            for rule, parts in compiled.items()
            if (match := rule.fullmatch(entry.name))
        ]
        if len(found) != 1:
            raise CheckpointError(
                f"{shard.file}: tensor '{entry.name}' is not part of a known InternVL checkpoint.",
                remedy="Merge adapters first; other variants of the model cannot be converted.",
            )
        match, parts = found[0]
        for template, rows in parts.items():
            name = match.expand(template)
            if name not in skipped:
                made.append(NewTensor(name, _shape(shard, entry, rows), entry, rows))
    return made


def _shape(shard: Shard, entry: TensorEntry, rows: Rows) -> tuple[int, ...]:
    if rows == WHOLE:
        return entry.shape
    block, rest = divmod(entry.shape[0], rows.groups * rows.members) if entry.shape else (0, 1)
    if rest:
        raise CheckpointError(
            f"{shard.file}: tensor '{entry.name}' has shape {entry.shape}, expected rows of "
            f"{rows.groups} x {rows.members} heads from config.json."
        )
    return (block * rows.groups * (rows.stop - rows.start), *entry.shape[1:])


def write_shard(source: Path, target: Path, tensors: Sequence[NewTensor]) -> Iterator[NewTensor]:
    """Write a safetensors file, yielding each tensor when it is done.

    Args:
        source: The original shard.
        target: A file that does not exist yet.
        tensors: The tensors to write.
    """
    with source.open("rb") as read_from, target.open("xb") as write_to:
        write_to.write(_header(tensors))
        for tensor in tensors:
            for start, stop in tensor.ranges():
                _copy(read_from, write_to, start, stop)
            yield tensor


def _header(tensors: Sequence[NewTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.num_bytes]
        position = offsets[1]
        entries[tensor.name] = {
            "dtype": tensor.source.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return len(text).to_bytes(8, "little") + text


def _copy(read_from: BinaryIO, write_to: BinaryIO, start: int, stop: int) -> None:
    read_from.seek(start)
    while start < stop:
        data = read_from.read(min(CHUNK, stop - start))
        if not data:
            raise CheckpointError("A shard of the source became shorter while it was read.")
        write_to.write(data)
        start += len(data)


def index_json(shards: Mapping[str, Sequence[NewTensor]]) -> str:
    """The index of a result with several shards: file -> its tensors."""
    everything = [tensor for tensors in shards.values() for tensor in tensors]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in everything),
            "total_size": sum(tensor.num_bytes for tensor in everything),
        },
        "weight_map": {tensor.name: file for file, tensors in shards.items() for tensor in tensors},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
