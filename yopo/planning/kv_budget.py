"""Which storage of visual keys and values keeps to a budget of KV bytes.

Numbers in fewer bits cost less accuracy than heads that no longer read, down to 4 bits, and where a
layer has a bottleneck its latent takes fewer bytes still. So for the shape that the budget of FLOPs
gives, the finest storage that fits without dropping heads comes first, then one that is finer in
the layers that read most. Heads are dropped for what is still over the budget, and where a model is
at hand coarser and finer storages are measured beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from yopo.planning.templates import Layers, TemplateBuilder
from yopo.plans.schema import LayerPlan

Build = Callable[[TemplateBuilder], Layers | None]
"""Makes layers within a builder's budgets; None if there are none."""


@dataclass(frozen=True)
class Storage:
    """How the visual keys and values of layers that are read are stored.

    Attributes:
        key_bits: Of a number of a key; None: the model's own numbers.
        value_bits: Of a number of a value, likewise.
        latent_bits: Of a number of the latent, where a layer has one; None: keys and values are
            stored there as well.
        finer: What some layers take instead, those that read most first, as long as bytes are left.
    """

    key_bits: int | None
    value_bits: int | None
    latent_bits: int | None = None
    finer: Storage | None = None

    def __str__(self) -> str:
        names = ("keys", self.key_bits), ("values", self.value_bits), ("latents", self.latent_bits)
        each = ", ".join(f"{name} in {bits} bits" for name, bits in names if bits is not None)
        return (each or "all bits") + (" and finer" if self.finer else "")

    def of(self, layer: LayerPlan) -> LayerPlan:
        """A layer in this storage."""
        if not layer.read_heads:
            return layer
        if self.latent_bits is not None and layer.qkv_rank is not None:
            return replace(layer, key_bits=None, value_bits=None, latent_bits=self.latent_bits)
        return replace(layer, key_bits=self.key_bits, value_bits=self.value_bits, latent_bits=None)


WHOLE = Storage(None, None)

_FINE = (WHOLE, Storage(8, 8), Storage(8, 4), Storage(4, 4))

STORAGES = (*_FINE, Storage(4, 2), Storage(2, 2))
"""What a budget of KV bytes chooses among for original weights, finest first."""

WITH_LATENTS = (
    *_FINE,
    *(Storage(4, 4, 8), Storage(4, 4, 4)),
    *(Storage(4, 2, 4), Storage(2, 2, 4)),
)
"""The same for fitted weights, which may have a latent. Latents come late as their keys have to be
made again in every decode step."""

_NARROWED = Storage(4, 4, 4)
"""What allocations take if nothing fits as it is: bottlenecks are then chosen by their bytes, too.
Within few bytes wide ones in 4 bits lose less than narrow ones in 8."""


class KVBudget:
    """Keeps layers to a budget of KV bytes by their storage, and by dropping heads.

    Args:
        builder: Knows the model, the scores and both budgets.
        storages: What may be chosen, finest first; ``WHOLE`` alone leaves heads to drop.
    """

    def __init__(self, builder: TemplateBuilder, storages: Sequence[Storage]):
        self.builder, self.storages = builder, tuple(storages)
        self._unlimited = builder.with_kv_budget(1.0)

    @classmethod
    def of(
        cls, builder: TemplateBuilder, *, is_limited: bool, has_latents: bool = False
    ) -> KVBudget:
        """With all storages where a budget is asked for, and keys were measured."""
        if not is_limited or builder.statistics.key_scale is None:
            return cls(builder, (WHOLE,))
        return cls(builder, WITH_LATENTS if has_latents else STORAGES)

    def store(self, build: Build, storage: Storage | None = None) -> Layers | None:
        """Build layers and store them.

        Args:
            build: Makes the layers.
            storage: How; heads are dropped, or bottlenecks narrowed, if that is not enough. None:
                the finest for which they are not, else the coarsest (with latents: in 4 bits).
        """
        if storage is None:
            _, layers = self._enough(build)
            return layers
        layers = build(self._unlimited)
        if layers is None or not self._fits(_in(storage, layers)):
            layers = build(self._limited(storage))
        return None if layers is None else self._stored(layers, storage)

    def directions(self, build: Build) -> Iterator[Sequence[Storage]]:
        """What is worth measuring beside the storage that ``store`` chooses.

        Whoever finds one that is no better need not go on in its direction: without latents;
        coarser where layers have none; finer in some layers; finer everywhere, each dropping more
        heads than the one before.
        """
        if len(self.storages) == 1:
            return
        chosen, _ = self._enough(build)
        place = self.storages.index(chosen)
        if chosen.latent_bits is not None:
            plain, _ = KVBudget(self.builder, STORAGES)._enough(build)
            yield (plain,)
            yield self.storages[place + 1 :]
        if place:
            finer = self.storages[place - 1]
            if (chosen.latent_bits is None) == (finer.latent_bits is None):
                yield (replace(chosen, finer=finer),)
            yield self.storages[place - 1 :: -1]

    def least_share(self) -> float:
        """Share of the KV bytes that one layer takes which reads with all heads, at least."""
        builder = self._limited(self.storages[-1])
        return builder.kv_share((builder.reader_layer,))

    def _limited(self, storage: Storage) -> TemplateBuilder:
        return self.builder.with_kv_budget(self.builder.kv_budget, storage.of)

    def _enough(self, build: Build) -> tuple[Storage, Layers | None]:
        """What ``store`` chooses by itself, and the layers in it."""
        layers = build(self._unlimited)
        if layers is None:
            return self.storages[-1], None
        for storage in self.storages:
            if self._fits(_in(storage, layers)):
                return storage, _in(storage, layers)
            if storage in (_NARROWED, self.storages[-1]):
                limited = build(self._limited(storage))
                if limited is not None:
                    return storage, _in(storage, limited)
        return self.storages[-1], None

    def _stored(self, layers: Layers, storage: Storage) -> Layers:
        """Layers in a storage, the best readers in the finer one while the budget lasts."""
        found = list(_in(storage, layers))
        if storage.finer is not None:
            finer = _in(storage.finer, layers)
            for number in self._by_reading():
                tried = [*found[:number], finer[number], *found[number + 1 :]]
                if self._fits(tuple(tried)):
                    found = tried
        return tuple(found)

    def _by_reading(self) -> list[int]:
        """Layers, those whose heads read with most effect first."""
        worth = self.builder.statistics.reading.sum(dim=1)
        return torch.argsort(worth, descending=True, stable=True).tolist()

    def _fits(self, layers: Layers) -> bool:
        return self.builder.keeps_kv(layers)


def _in(storage: Storage, layers: Layers) -> Layers:
    return tuple(map(storage.of, layers))
