"""Which storage of visual keys and values keeps to a budget of KV bytes.

Numbers in fewer bits cost less accuracy than heads that no longer read, down to 4 bits. So for the
shape that the budget of FLOPs gives, the finest storage that fits without dropping heads comes
first, then one that is finer in the layers that read most. Heads are dropped for what is still over
the budget, and where a model is at hand finer storages that need it are measured beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from yopo.planning.templates import Layers, TemplateBuilder
from yopo.plans.kv_storage import bytes_of_head
from yopo.plans.schema import ModelShape

Build = Callable[[TemplateBuilder], Layers | None]
"""Makes layers within a builder's budgets; None if there are none."""

_WHOLE_BYTES = 2
"""Of a number that is not quantised: shares are of a cache in 16 bits."""


@dataclass(frozen=True)
class Storage:
    """How the visual keys and values of layers that are read are stored.

    Attributes:
        key_bits: Of a number of a key; None: the model's own numbers.
        value_bits: Of a number of a value, likewise.
        finer: What some layers take instead, those that read most first, as long as bytes are left.
    """

    key_bits: int | None
    value_bits: int | None
    finer: Storage | None = None

    def __str__(self) -> str:
        each = ", ".join(
            f"{name} in {bits} bits"
            for name, bits in (("keys", self.key_bits), ("values", self.value_bits))
            if bits is not None
        )
        return (each or "all bits") + (" and finer" if self.finer else "")

    def share(self, shape: ModelShape) -> float:
        """Bytes over those of 16-bit numbers, where no layer takes the finer one."""
        stored = sum(
            bytes_of_head(shape.head_dim, bits, _WHOLE_BYTES)
            for bits in (self.key_bits, self.value_bits)
        )
        return stored / (2 * bytes_of_head(shape.head_dim, None, _WHOLE_BYTES))


WHOLE = Storage(None, None)

STORAGES = (WHOLE, Storage(8, 8), Storage(8, 4), Storage(4, 4), Storage(4, 2), Storage(2, 2))
"""What a budget of KV bytes chooses among, finest first."""


class KVBudget:
    """Keeps layers to a budget of KV bytes by their storage, and by dropping heads.

    Args:
        builder: Knows the model, the scores and both budgets.
        storages: What may be chosen, finest first; ``WHOLE`` alone leaves heads to drop.
    """

    def __init__(self, builder: TemplateBuilder, storages: Sequence[Storage]):
        self.builder, self.storages = builder, tuple(storages)
        self.shape = builder.shape
        self._unlimited = builder.with_kv_budget(1.0)

    @classmethod
    def of(cls, builder: TemplateBuilder, *, is_limited: bool) -> KVBudget:
        """With all storages where a budget is asked for, and keys were measured."""
        has_scales = is_limited and builder.statistics.key_scale is not None
        return cls(builder, STORAGES if has_scales else (WHOLE,))

    def store(self, build: Build, storage: Storage | None = None) -> Layers | None:
        """Build layers and store them.

        Args:
            build: Makes the layers.
            storage: How; heads are dropped if that is not enough. None: the finest that needs no
                head dropped, else the coarsest.
        """
        layers = None
        if storage is None:
            storage = self.storages[0]
            if len(self.storages) > 1:
                layers = build(self._unlimited)
                storage = self.enough(layers)
        limit = min(1.0, self.builder.kv_budget / storage.share(self.shape))
        if layers is None or limit < 1:
            layers = build(self.builder.with_kv_budget(limit))
        return None if layers is None else self._stored(layers, storage)

    def enough(self, layers: Layers | None) -> Storage:
        """The finest storage in which layers keep to the budget, else the coarsest."""
        if layers is None:
            return self.storages[-1]
        share = self.builder.kv_share(layers)
        fitting = (each for each in self.storages if self._fits(each.share(self.shape) * share))
        return next(fitting, self.storages[-1])

    def others(self, build: Build) -> Iterator[Storage]:
        """What is worth measuring beside the storage that ``store`` chooses.

        Finer and finer: each drops more heads than the one before, so whoever finds one that is no
        better need not go on.
        """
        if len(self.storages) == 1:
            return
        chosen = self.enough(build(self._unlimited))
        place = self.storages.index(chosen)
        if place:
            yield replace(chosen, finer=self.storages[place - 1])
            yield from reversed(self.storages[:place])

    def _stored(self, layers: Layers, storage: Storage) -> Layers:
        """Layers in a storage, the best readers in the finer one while the budget lasts."""
        found = list(_in(storage, layers))
        if storage.finer is not None:
            finer = _in(storage.finer, layers)
            for number in self._by_reading():
                tried = [*found[:number], finer[number], *found[number + 1 :]]
                if self._fits(self.builder.kv_share(tuple(tried))):
                    found = tried
        return tuple(found)

    def _by_reading(self) -> list[int]:
        """Layers, those whose heads read with most effect first."""
        worth = self.builder.statistics.reading.sum(dim=1)
        return torch.argsort(worth, descending=True, stable=True).tolist()

    def _fits(self, share: float) -> bool:
        return share <= self.builder.kv_budget + 1e-9


def _in(storage: Storage, layers: Layers) -> Layers:
    return tuple(
        replace(layer, key_bits=storage.key_bits, value_bits=storage.value_bits)
        if layer.read_heads
        else layer
        for layer in layers
    )
