"""The grouping of query heads by the keys they read, for a layer's attention calls.

A KV head is *kept* if one of its query heads may read visual keys; only kept KV heads hold visual
keys and values. Query heads then fall into three groups: reading ones (text and visual keys),
dropped ones of a kept KV head, and those of the other KV heads (both read only text keys).
Attention calls need the same number of query heads per KV head, so each group is padded to a
rectangle by repeating a head; whole KV groups and multi-head attention need no padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from yopo.plans.schema import LayerPlan, ModelShape
from yopo.runtime.buffers import Packing

Index = slice | torch.Tensor
"""A selection along one dimension: a slice (a view) where possible, else int64 positions."""


def as_index(positions: list[int]) -> Index:
    """A slice if the positions are consecutive, else a tensor."""
    if positions and positions == list(range(positions[0], positions[0] + len(positions))):
        return slice(positions[0], positions[0] + len(positions))
    return torch.tensor(positions, dtype=torch.int64)


def take(tensor: torch.Tensor, index: Index, dim: int = 1) -> torch.Tensor:
    """Select along ``dim``: a view for a slice, a copy for positions."""
    if isinstance(index, slice):
        return tensor.narrow(dim, index.start, index.stop - index.start)
    return tensor.index_select(dim, index.to(tensor.device))


@dataclass(frozen=True, eq=False)
class HeadSplit:
    """The head groups of one layer.

    Attributes:
        kept_kv: KV heads with visual keys, as positions among all KV heads.
        other_kv: The other KV heads.
        kept: The kept query heads, KV head by KV head.
        reading: Query heads that read, padded to a rectangle.
        dropped: Dropped query heads of kept KV heads, padded to a rectangle.
        other: Query heads of the other KV heads.
        restore: Position of every query head in the concatenated outputs of ``reading``,
            ``dropped`` and ``other``; None if they are already in order.
        attending: Query heads in which visual tokens attend, KV head by KV head: the rows of the
            visual q projection.
        attending_kv: Their KV heads, as positions in ``kept_kv``; None if all.
        rectangle: Position in ``attending`` of every entry of its padded rectangle; None if equal.
        places: Position in that rectangle of every entry of ``attending``; None if equal.
        num_kept_kv: Number of kept KV heads.
        attending_width: Query heads per KV head in the attending rectangle (0: none attends).
        reading_width: Query heads per KV head in ``reading`` (0: none reads).
        dropped_width: Query heads per KV head in ``dropped`` (0: there are none).
        other_width: Query heads per KV head in ``other`` (0: there are none).
        packings: How visual keys and values of kept KV heads are packed; None: not at all.
        latent_rank: Width of the latent that is held in their place; 0: they are held.
        latent: How it is packed; None: not at all.
    """

    kept_kv: Index
    other_kv: Index
    kept: tuple[int, ...]
    reading: Index
    dropped: Index
    other: Index
    restore: torch.Tensor | None
    attending: tuple[int, ...]
    attending_kv: Index | None
    rectangle: Index | None
    places: torch.Tensor | None
    num_kept_kv: int
    attending_width: int
    reading_width: int
    dropped_width: int
    other_width: int
    packings: tuple[Packing | None, Packing | None] = (None, None)
    latent_rank: int = 0
    latent: Packing | None = None

    def to(self, device: torch.device) -> HeadSplit:
        """This split with its positions on a device, so that no call has to move them."""
        keys, values = self.packings
        return replace(
            self,
            kept_kv=_moved(self.kept_kv, device),
            other_kv=_moved(self.other_kv, device),
            reading=_moved(self.reading, device),
            dropped=_moved(self.dropped, device),
            other=_moved(self.other, device),
            restore=_moved(self.restore, device),
            attending_kv=_moved(self.attending_kv, device),
            rectangle=_moved(self.rectangle, device),
            places=_moved(self.places, device),
            packings=(_moved_packing(keys, device), _moved_packing(values, device)),
        )

    def differs(self, other: HeadSplit) -> bool:
        """Whether a cache that was filled under this split is of no use under another."""
        own, others = (
            [each and each.bits for each in (*split.packings, split.latent)]
            for split in (self, other)
        )
        is_same = self.kept == other.kept and self.latent_rank == other.latent_rank
        return not is_same or own != others

    def unpacked(self) -> HeadSplit:
        """This split with everything held in the model's own numbers."""
        return replace(self, packings=(None, None), latent=None)


_Places = TypeVar("_Places", Index, Index | None, torch.Tensor | None)


def _moved(places: _Places, device: torch.device) -> _Places:
    return places.to(device) if isinstance(places, torch.Tensor) else places


def _moved_packing(packing: Packing | None, device: torch.device) -> Packing | None:
    return None if packing is None else packing.to(device)


def split_heads(
    layer: LayerPlan, shape: ModelShape, key_scale: torch.Tensor | None = None
) -> HeadSplit:
    """Group the query heads of a layer.

    Args:
        layer: The layer's plan.
        shape: The decoder's dimensions.
        key_scale: (kv_heads, head_dim), needed where keys are quantised.
    """
    kept_kv = list(layer.kept_kv(shape))
    other_kv = [head for head in range(shape.kv_heads) if head not in kept_kv]
    groups = {kv: range(kv * shape.group, (kv + 1) * shape.group) for kv in range(shape.kv_heads)}
    reading_groups = [[head for head in groups[kv] if head in layer.read_heads] for kv in kept_kv]
    dropped_groups = [
        [head for head in groups[kv] if head not in layer.read_heads] for kv in kept_kv
    ]
    reading, reading_width = _rectangle(reading_groups, [g[0] for g in reading_groups])
    dropped, dropped_width = _rectangle(dropped_groups, [groups[kv][0] for kv in kept_kv])
    other = [head for kv in other_kv for head in groups[kv]]
    kept = [head for group in reading_groups for head in group]
    order = reading + dropped + other
    # Padding repeats heads that may belong to another call: look each head up in its own.
    places: dict[int, int] = {}
    for offset, owned, rectangle in (
        (0, set(kept), reading),
        (len(reading), set(range(shape.heads)) - set(kept), dropped),
        (len(reading) + len(dropped), set(other), other),
    ):
        for place, head in enumerate(rectangle):
            if head in owned:
                places.setdefault(head, offset + place)
    restore = [places[head] for head in range(shape.heads)]
    identity = restore == list(range(shape.heads)) and len(order) == shape.heads
    return HeadSplit(
        **_attending(layer, shape, kept_kv),
        kept_kv=as_index(kept_kv),
        other_kv=as_index(other_kv),
        kept=tuple(kept),
        reading=as_index(reading),
        dropped=as_index(dropped),
        other=as_index(other),
        restore=None if identity else torch.tensor(restore),
        num_kept_kv=len(kept_kv),
        reading_width=reading_width,
        dropped_width=dropped_width,
        other_width=shape.group if other else 0,
        packings=_packings(layer, kept_kv, key_scale),
        **_latent(layer),
    )


def _latent(layer: LayerPlan) -> dict[str, Any]:
    """The fields that say what is held in place of visual keys and values."""
    if layer.latent_bits is None:
        return {}
    return {"latent_rank": layer.qkv_rank, "latent": Packing(layer.latent_bits, None)}


def _packings(
    layer: LayerPlan, kept_kv: list[int], key_scale: torch.Tensor | None
) -> tuple[Packing | None, Packing | None]:
    """How visual keys and values of the kept KV heads are packed."""
    keys = values = None
    if layer.key_bits is not None:
        assert key_scale is not None, "plans with quantised keys are checked for their scales"
        keys = Packing(layer.key_bits, key_scale[kept_kv][:, None].float())
    if layer.value_bits is not None:
        values = Packing(layer.value_bits, None)
    return keys, values


def _attending(layer: LayerPlan, shape: ModelShape, kept_kv: list[int]) -> dict[str, Any]:
    """The fields that say in which heads visual tokens attend."""
    by_kv: dict[int, list[int]] = {}
    for head in layer.attend_heads:
        by_kv.setdefault(head // shape.group, []).append(head)
    attending = [head for group in by_kv.values() for head in group]
    rectangle, width = _rectangle(list(by_kv.values()), [group[0] for group in by_kv.values()])
    is_same = rectangle == attending
    return {
        "attending": tuple(attending),
        "attending_width": width,
        "attending_kv": None
        if list(by_kv) == kept_kv
        else as_index([kept_kv.index(each) for each in by_kv]),
        "rectangle": None if is_same else as_index([attending.index(h) for h in rectangle]),
        "places": None if is_same else torch.tensor([rectangle.index(h) for h in attending]),
    }


def _rectangle(groups: list[list[int]], padding: list[int]) -> tuple[list[int], int]:
    width = max((len(group) for group in groups), default=0)
    cells = []
    for group, filler in zip(groups, padding, strict=True):
        cells += group + [filler] * (width - len(group))
    return cells, width
