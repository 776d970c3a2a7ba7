"""The model that a command works on: given by name and loaded when needed, or in memory."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from yopo.checkpoint.reader import Checkpoint, fetch
from yopo.data.processor_options import with_options
from yopo.data.processor_settings import settled
from yopo.data.prompts import load_processor
from yopo.models.registry import ALIASES, ModelSource, family_of, resolve
from yopo.pipeline.options import RunOptions
from yopo.serving.layers_on_disk import cache_first_layers, map_for
from yopo.serving.loading import load_dense, torch_dtype
from yopo.serving.places import read_device_map
from yopo.serving.precision import dtype_for
from yopo.support.errors import ModelError

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
        self._source, self.name, self.path = source, source.name, path_of(source)
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

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, in eval mode; loaded at the first use."""
        dtype, places = torch_dtype(self._options.dtype), self._options.device_map
        if places is not None:
            places = read_device_map(places)
            return load_dense(
                self._source, checkpoint=self._checkpoint, dtype=dtype, device_map=places
            )
        assert self._checkpoint is not None, "a model in memory is not loaded"
        dtype = dtype_for(dtype, self._checkpoint, self._options.device)
        on_disk = map_for(self._checkpoint, dtype, self._options.device, self._options.offload)
        if on_disk is not None:
            model = load_dense(
                self._source, checkpoint=self._checkpoint, dtype=dtype, device_map=on_disk
            )
            cache_first_layers(model.get_decoder(), self._checkpoint)
            return model
        model = load_dense(self._source, checkpoint=self._checkpoint, dtype=dtype)
        nn.Module.to(model, self._options.device)  # transformers' own `to` has no usable type
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
