"""The tensors of a decoder layer, and which of their axes count heads or neurons.

The single source for both: the reader checks shapes with it, baking finds what to reorder. Unknown
tensors are refused, because copying them unchanged might silently break the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from yopo.checkpoint.headers import FLOATS, TensorEntry
from yopo.models.family import DECODER_KEY, Backbone
from yopo.plans.schema import ModelShape
from yopo.support.errors import CheckpointError

HEADS, KV_HEADS, NEURONS = "heads", "kv_heads", "neurons"
UNITS = (HEADS, KV_HEADS, NEURONS)
"""Kinds of units that baking reorders; the other kinds are ``hidden`` and ``head_dim``."""

Axis = tuple[str, ...]
"""The units of an axis, segment by segment; a fused projection's rows have several segments, each
with its own order: (heads, KV heads, KV heads), (neurons, neurons)."""

BUFFERS = frozenset({"self_attn.rotary_emb.inv_freq"})
"""Leftovers in old checkpoints: not parameters of the model, copied unchanged."""

DecoderTensors = Mapping[tuple[int, str], TensorEntry]
"""(layer, name inside the layer) -> its entry in the file."""


def axes_of(backbone: Backbone) -> dict[str, tuple[Axis, ...]]:
    """The axes of every tensor that a layer of this backbone may have.

    Returns:
        Name inside the layer (``self_attn.q_proj.weight``) -> its axes.
    """
    rows: dict[str, Axis] = {}
    attention = ((backbone.query, HEADS), (backbone.key, KV_HEADS), (backbone.value, KV_HEADS))
    ffn = ((backbone.gate, NEURONS), (backbone.up, NEURONS))
    for holder, parts in (("self_attn", attention), ("mlp", ffn)):
        for part, unit in parts:  # a repeated name is a fused projection: another segment
            name = f"{holder}.{part}"
            rows[name] = (*rows.get(name, ()), unit)
    hidden: Axis = ("hidden",)
    axes: dict[str, tuple[Axis, ...]] = {}
    for name, axis in rows.items():
        axes |= {f"{name}.weight": (axis, hidden), f"{name}.bias": (axis,)}
    for part, unit in ((f"self_attn.{backbone.output}", HEADS), (f"mlp.{backbone.down}", NEURONS)):
        axes |= {f"{part}.weight": (hidden, (unit,)), f"{part}.bias": (hidden,)}
    for norm in (backbone.attention_norm, backbone.ffn_norm):
        axes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    # Norms over one head's width, shared by all heads: nothing to reorder.
    axes |= {f"self_attn.{norm}.weight": (("head_dim",),) for norm in ("q_norm", "k_norm")}
    return axes


def required_names(backbone: Backbone) -> list[str]:
    """Names of the required tensors of a layer; biases and head norms are optional."""
    optional = (".bias", "q_norm.weight", "k_norm.weight")
    return [name for name in axes_of(backbone) if not name.endswith(optional)]


def sizes_of(shape: ModelShape) -> dict[str, int]:
    """Length of an axis (or a segment of one) of each kind."""
    return {
        HEADS: shape.heads * shape.head_dim,
        KV_HEADS: shape.kv_heads * shape.head_dim,
        NEURONS: shape.ffn,
        "hidden": shape.hidden,
        "head_dim": shape.head_dim,
    }


def find_decoder(
    path: Path, entries: Iterable[TensorEntry], backbone: Backbone, shape: ModelShape
) -> dict[tuple[int, str], TensorEntry]:
    """Pick a checkpoint's decoder tensors and check them against the configuration.

    Args:
        path: The checkpoint, for messages.
        entries: All of its tensors.
        backbone: Names of the parts of a layer.
        shape: Expected dimensions.

    Raises:
        CheckpointError: A tensor is missing, unknown, duplicated, packed or of another shape.
    """
    found: dict[tuple[int, str], TensorEntry] = {}
    for entry in entries:
        match = DECODER_KEY.match(entry.name)
        if match is None or match[2] in BUFFERS:
            continue
        key = (int(match[1]), match[2])
        if key in found:
            raise CheckpointError(
                f"{path}: holds layer {key[0]}'s {key[1]} twice: '{found[key].name}' and "
                f"'{entry.name}'."
            )
        found[key] = entry
    required = required_names(backbone)
    for layer in range(shape.layers):
        for name in required:
            if (layer, name) not in found:
                raise CheckpointError(
                    f"{path}: lacks {name} of decoder layer {layer}, but config.json describes "
                    f"{shape.layers} layers.",
                    remedy="Download the checkpoint again, or re-save it with save_pretrained().",
                )
    _check_shapes(path, found, axes_of(backbone), shape)
    return found


def _check_shapes(
    path: Path, found: DecoderTensors, axes: Mapping[str, tuple[Axis, ...]], shape: ModelShape
) -> None:
    sizes = sizes_of(shape)
    for (layer, name), entry in found.items():
        if layer >= shape.layers:
            raise CheckpointError(
                f"{path}: tensor '{entry.name}' is from layer {layer}, but config.json describes "
                f"{shape.layers} layers (0 to {shape.layers - 1})."
            )
        if name not in axes:
            raise CheckpointError(
                f"{path}: tensor '{entry.name}' is not a known part of a decoder layer, so it is "
                "unclear whether it must be reordered.",
                remedy="Merge adapters and undo quantization before applying a plan.",
            )
        expected = tuple(sum(sizes[kind] for kind in axis) for axis in axes[name])
        if entry.shape != expected:
            raise CheckpointError(
                f"{path}: tensor '{entry.name}' has shape {entry.shape}, expected {expected} "
                "from config.json."
            )
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: tensor '{entry.name}' has type {entry.dtype}, expected one of "
                f"{', '.join(FLOATS)}.",
                remedy="Apply the plan to the unquantized checkpoint.",
            )
