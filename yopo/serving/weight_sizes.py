"""How many weights a model has, and in which parts, before any is loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from yopo.models.registry import family_of


@dataclass(frozen=True)
class WeightSizes:
    """Numbers of weights.

    Attributes:
        total: All; tied ones count once.
        layer: Of the largest decoder layer.
        layers: Of all decoder layers.
        tower: Of the vision tower and the projector.
        tower_layer: Of the largest of the tower's layers.
        tower_layers: Of all of these.
        dtype: What they are in memory.
    """

    total: int
    layer: int
    layers: int
    tower: int
    tower_layer: int
    tower_layers: int
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return self.total * self.itemsize

    def resident_bytes(self, *, towers_on_disk: bool) -> int:
        """Bytes of what is in memory where decoder layers are on disk, one of them at hand.

        Args:
            towers_on_disk: Whether the tower's layers are, too.
        """
        count = self.total - self.layers + self.layer
        if towers_on_disk:
            count -= self.tower_layers - self.tower_layer
        return count * self.itemsize

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype) -> WeightSizes:
        """Those of a model, in memory or on the meta device, in a dtype."""
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        layers = [_count(each) for each in decoder.layers]
        text = {each for part in (decoder, head) if part is not None for each in part.parameters()}
        total = _count(model)
        tower = total - sum(each.numel() for each in text)
        others = [
            _count(each)
            for module in model.modules()
            if isinstance(module, nn.ModuleList) and module is not decoder.layers
            for each in module
        ]
        towers = max(others, default=0), sum(others)
        return cls(total, max(layers), sum(layers), tower, *towers, dtype)


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights, of a configuration."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, family_of(config).architecture)(config)
    return model


def loaded_dtype(dtype: torch.dtype | str, config: PreTrainedConfig) -> torch.dtype:
    """What weights are loaded as; for ``auto`` as a configuration says."""
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None)
    return kind if isinstance(kind, torch.dtype) else torch.float32


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
