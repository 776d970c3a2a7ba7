"""Counts how often weights that are not in memory are fetched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

from yopo.models import offloaded


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Weights by name, and how often accelerate's hooks or ``at_hand`` have fetched each."""
    found: Counter[str] = Counter()
    by_hooks, at_hand = OffloadedWeightsLoader.__getitem__, offloaded._Files.read

    def fetch(loader: OffloadedWeightsLoader, key: str) -> torch.Tensor:
        found[key] += 1
        return by_hooks(loader, key)

    def read(
        files: offloaded._Files, weights: Mapping[str, torch.Tensor], name: str
    ) -> torch.Tensor:
        assert isinstance(weights, PrefixedDataset)
        before = found.total()
        value = at_hand(files, weights, name)
        if found.total() == before:
            found[f"{weights.prefix}{name}"] += 1
        return value

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", fetch)
    monkeypatch.setattr(offloaded._Files, "read", read)
    return found


def of_decoder(found: Counter[str]) -> Counter[str]:
    """Those of the decoder's layers."""
    return Counter({key: count for key, count in found.items() if "language_model.layers." in key})
