"""What one rank of a tensor-parallel group holds of a layer.

vLLM gives each rank consecutive heads and consecutive neurons. Visual tokens use the first neurons
only, which would all be on the first ranks; so neurons are dealt out in turn before they are
loaded, which leaves the function of the FFN unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from yopo.models.family import DECODER_KEY


@dataclass(frozen=True)
class Shard:
    """One rank of a group: its number and the group's size."""

    rank: int
    size: int

    def heads(self, total: int) -> range:
        """Its query heads."""
        own = total // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def kv_heads(self, total: int) -> range:
        """Its KV heads; ranks share one if there are more ranks."""
        if total >= self.size:
            return self.heads(total)
        shared = self.rank // (self.size // total)
        return range(shared, shared + 1)

    def dealt(self, total: int) -> slice:
        """Its part of things that are dealt out in turn: neurons, ranks of maps."""
        return slice(self.rank, total, self.size)

    def count(self, total: int) -> int:
        """The number of things in :meth:`dealt`."""
        return len(range(self.rank, total, self.size))


_FFN = re.compile(r"^mlp\.(gate_proj|up_proj|gate_up_proj|down_proj)\.(weight|bias)$")


def deal_neurons(
    weights: Iterable[tuple[str, torch.Tensor]], ranks: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors with the neurons of its decoder dealt out to this many ranks."""
    for name, weight in weights:
        key = DECODER_KEY.match(name)
        found = _FFN.match(key.group(2)) if key and ranks > 1 else None
        if found is not None and (found.group(1), found.group(2)) != ("down_proj", "bias"):
            weight = _dealt(weight, found.group(1), ranks)
        yield name, weight


def _dealt(weight: torch.Tensor, part: str, ranks: int) -> torch.Tensor:
    if part == "gate_up_proj":  # fused: both halves alike
        return torch.cat([_dealt(half, "gate_proj", ranks) for half in weight.chunk(2)])
    dim = 1 if part == "down_proj" else 0
    count = weight.shape[dim]
    order = torch.cat([torch.arange(rank, count, ranks) for rank in range(ranks)])
    return weight.index_select(dim, order.to(weight.device))
