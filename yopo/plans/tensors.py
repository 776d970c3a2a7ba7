"""The tensors of a plan: neuron orders, means and fitted weights. No torch is imported.

Only :mod:`yopo.plans.storage` knows how and where they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from yopo.plans.layer_plan import LayerPlan, ModelShape

if TYPE_CHECKING:
    import torch

Refit = Mapping[str, "torch.Tensor"]
"""One layer's fitted weights for visual tokens, by name: see :func:`refit_sizes`."""


@dataclass(frozen=True, eq=False)
class PlanTensors:
    """The tensors that a plan needs in addition to its numbers.

    Attributes:
        neuron_order: (layers, ffn) int64, each layer's neurons from most to least important;
            None if the checkpoint's neurons are already in that order (baked).
        neuron_mean: (layers, ffn) float32, mean FFN activation over visual tokens in the
            checkpoint's own neuron order; None without ``mean`` compensation.
        head_mean: (layers, heads, head_dim) float32, mean attention output of every query head
            over visual tokens; None without ``mean`` compensation.
        key_scale: (layers, kv_heads, head_dim) float32, by which visual keys are divided before
            they are quantised, in the checkpoint's own order of KV heads; None if no layer's keys
            are.
        refit: Layer -> its fitted weights; layers without any are absent, and it is empty without
            ``refit`` compensation.
    """

    neuron_order: torch.Tensor | None = None
    neuron_mean: torch.Tensor | None = None
    head_mean: torch.Tensor | None = None
    refit: Mapping[int, Refit] = field(default_factory=dict)
    key_scale: torch.Tensor | None = None

    def __eq__(self, other: object) -> bool:  # and thus no hash: tensors are mutable
        if not isinstance(other, PlanTensors):
            return NotImplemented
        own, others = dict(self.named()), dict(other.named())
        return own.keys() == others.keys() and all(
            tensor.equal(others[name]) for name, tensor in own.items()
        )

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors with their names: ``neuron_order``, ``refit.3.down``, ..."""
        for each in fields(self):
            tensor = getattr(self, each.name)
            if each.name != "refit" and tensor is not None:
                yield each.name, tensor
        for layer, weights in self.refit.items():
            for name, tensor in weights.items():
                yield f"refit.{layer}.{name}", tensor

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in memory; 0 if there are none."""
        return sum(tensor.nbytes for _, tensor in self.named())

    def of_layers(self, indices: Sequence[int]) -> PlanTensors:
        """The tensors of some layers, renumbered."""
        rows = list(indices)
        names = ("neuron_order", "neuron_mean", "head_mean", "key_scale")
        parts = {name: getattr(self, name) for name in names}
        parts = {name: None if each is None else each[rows] for name, each in parts.items()}
        refit = {new: self.refit[old] for new, old in enumerate(rows) if old in self.refit}
        return PlanTensors(**parts, refit=refit)


def refit_sizes(layer: LayerPlan, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and sizes of the weights that ``refit`` compensation fits in one layer.

    ``reduce`` (rank, hidden) takes normed visual states into the bottleneck, with a bias that
    centres its output where that is cached; ``query``, ``key``
    and ``value`` (rows, rank) with their biases lead out of it, for the attending heads and for
    the kept KV heads, ascending. ``output`` (hidden, columns) replaces the output projection
    where only some heads attend, ``down`` (hidden, neurons) the down projection where only some
    neurons are used, in order of importance. ``map_out @ map_in`` is the linear map; ``ffn_bias``
    belongs to ``down`` or the map.
    """
    hidden = shape.hidden
    sizes: dict[str, tuple[int, ...]] = {}
    queries = len(layer.attend_heads) * shape.head_dim
    keys = len(layer.kept_kv(shape)) * shape.head_dim
    if layer.qkv_rank is not None:
        sizes["reduce"] = (layer.qkv_rank, hidden)
        if layer.latent_bits is not None:
            sizes["reduce_bias"] = (layer.qkv_rank,)
        for name, rows in (("query", queries), ("key", keys), ("value", keys)):
            if rows:
                sizes |= {name: (rows, layer.qkv_rank), f"{name}_bias": (rows,)}
    if 0 < len(layer.attend_heads) < shape.heads:
        sizes |= {"output": (hidden, queries), "output_bias": (hidden,)}
    if 0 < layer.neurons < shape.ffn:
        sizes["down"] = (hidden, layer.neurons)
    if layer.map_rank:
        sizes |= {"map_in": (layer.map_rank, hidden), "map_out": (hidden, layer.map_rank)}
    if "down" in sizes or "map_in" in sizes:
        sizes["ffn_bias"] = (hidden,)
    return sizes
