"""The model that a command works on: given by name and loaded when needed, or in memory."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from yopo.checkpoint.reader import Checkpoint, fetch
from yopo.data.processor_options import with_options
from yopo.data.processor_settings import settled
from yopo.data.prompts import load_processor
from yopo.models.devices import device_of
from yopo.models.family import shape_of
from yopo.models.offloaded import is_offloaded
from yopo.models.registry import ALIASES, ModelSource, family_of, resolve
from yopo.pipeline.options import RunOptions
from yopo.serving.layers_on_disk import OFFLOAD, cache_first_layers, map_for
from yopo.serving.loading import load_dense, torch_dtype
from yopo.serving.places import read_device_map
from yopo.serving.precision import dtype_for
from yopo.serving.weight_sizes import WeightSizes, loaded_dtype, on_meta
from yopo.support.errors import ModelError
from yopo.support.out_of_memory import memory_for, narrower

Model = str | Path | PreTrainedModel
"""An alias, directory or hub id; or a dense model in memory."""


class ModelHandle:
    """A dense model and its processor, checked as far as possible before weights are loaded.

    Args:
        model: A name, a location to load from, or a model in memory.
        processor: Required for a model in memory; otherwise overrides the checkpoint's.
        options: How to load it.

    Attributes:
        name: The model's name in plans; never a machine path.
        path: Its directory, unless the name alone leads to it.
        processor: The model's processor, with its settings completed.
        source: Where it is loaded from; None for a model in memory.

    Raises:
        YopoError: Unknown or unsuitable model; a model in memory without its processor.
    """

    def __init__(
        self,
        model: Model | ModelSource,
        processor: ProcessorMixin | None,
        options: RunOptions,
    ):
        self._options, self._checkpoint = options, None
        self.source: ModelSource | None = None
        if isinstance(model, PreTrainedModel):
            family_of(model.config)
            if processor is None:
                raise ModelError(
                    "A model in memory needs its processor.",
                    remedy="Pass processor=AutoProcessor.from_pretrained(...).",
                )
            self.name, self.path = _named(model)
            self.processor = self._with_options(settled(processor, model.config, self.name))
            self.model = model.eval()
            return
        source = model if isinstance(model, ModelSource) else resolve(str(model))
        self.source, self.name, self.path = source, source.name, path_of(source)
        self._checkpoint = Checkpoint.open(fetch(source))  # before anything slow
        if processor is not None:
            found = settled(processor, self._checkpoint.config, self.name)
        else:
            found = load_processor(
                str(self._checkpoint.path), trust_remote_code=options.trust_remote_code
            )
        self.processor = self._with_options(found)

    def _with_options(self, processor: ProcessorMixin) -> ProcessorMixin:
        return with_options(processor, self._options.image_options, self.name)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, which needs no weights."""
        return self.model.config if self._checkpoint is None else self._checkpoint.config

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory, or wherever else they stay."""
        return "model" in vars(self)

    @cached_property
    def weight_sizes(self) -> WeightSizes:
        """How many weights there are; loads none."""
        if self._checkpoint is None:
            return WeightSizes.of(self.model, self.model.dtype)
        return WeightSizes.of(on_meta(self.config), loaded_dtype(self._dtype, self.config))

    @property
    def stored_dtype(self) -> torch.dtype:
        """What weights are in their files."""
        return loaded_dtype("auto", self.config)

    @property
    def is_offloaded(self) -> bool:
        """Whether decoder layers are on disk; under a device map, whether they are known to be."""
        if self.is_loaded:
            return is_offloaded(self.model.get_decoder())
        return self.is_on_one_device and self._on_disk is not None

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that are in memory at a time, on whatever device."""
        if not self.is_offloaded:
            return self.weight_sizes.num_bytes
        if self.is_loaded:
            layers = set(map(id, self.model.get_decoder().layers.parameters()))
            weights = self.model.parameters()
            towers = any(each.is_meta and id(each) not in layers for each in weights)
        else:
            on_disk = list((self._on_disk or {}).values()).count("disk")
            towers = on_disk > shape_of(self.config).layers
        return self.weight_sizes.resident_bytes(towers_on_disk=towers)

    @property
    def is_on_one_device(self) -> bool:
        """Whether no device map says where modules go."""
        return self._options.device_map is None

    @property
    def device(self) -> torch.device:
        """Where the model computes, or its first part."""
        return device_of(self.model) if self.is_loaded else torch.device(self._options.device)

    @cached_property
    def _dtype(self) -> torch.dtype | str:
        asked = torch_dtype(self._options.dtype)
        if self._checkpoint is None or not self.is_on_one_device:
            return asked
        return dtype_for(asked, self._checkpoint, self._options.device)

    @cached_property
    def _on_disk(self) -> dict[str, Any] | None:
        """The device map that leaves decoder layers on disk, or None."""
        assert self._checkpoint is not None, "a model in memory is not loaded"
        return map_for(self._checkpoint, self._dtype, self._options.device, self._options.offload)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, in eval mode; loaded at the first use.

        Raises:
            YopoError: Its weights do not fit, or it cannot be loaded.
        """
        places = self._options.device_map
        given = self._on_disk if places is None else read_device_map(places)
        map_of = {} if given is None else {"device_map": given}
        ways = OFFLOAD, narrower(self.weight_sizes.itemsize), "--device-map auto"
        with memory_for("loading the weights", *ways[given is not None :]):
            assert self.source is not None, "a model in memory is not loaded"
            model = load_dense(
                self.source, checkpoint=self._checkpoint, dtype=self._dtype, **map_of
            )
            if given is None:
                nn.Module.to(model, self._options.device)  # transformers' `to` has no usable type
        if places is None and given is not None:
            assert self._checkpoint is not None, "layers on disk are in a checkpoint"
            cache_first_layers(model.get_decoder(), self._checkpoint)
        return model


def path_of(source: ModelSource) -> Path | None:
    """The directory of a model that its name alone does not lead to."""
    is_inside = ALIASES.get(source.name, "").startswith("package:")
    return Path(source.location).absolute() if source.is_local and not is_inside else None


def _named(model: PreTrainedModel) -> tuple[str, Path | None]:
    """A name for a model in memory: the hub id or directory name that it was loaded from; and the
    directory, if it is one."""
    name = model.config.name_or_path or model.name_or_path
    if not name:
        return type(model).__name__, None
    try:
        source = resolve(name)
    except ModelError:  # moved since, or not loadable by yopo
        return Path(name).name or type(model).__name__, None
    return source.name, path_of(source)
