"""The model that a command works on: by its name, loaded when it is needed, or in memory."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from yopo.checkpoint.reader import Checkpoint, fetch
from yopo.data.processor_settings import settled
from yopo.data.prompts import load_processor
from yopo.models.registry import ModelSource, family_of, resolve
from yopo.pipeline.options import RunOptions
from yopo.serving.loading import load_dense, torch_dtype
from yopo.support.errors import ModelError

Model = str | Path | PreTrainedModel
"""An alias, directory or hub id; or a dense model in memory."""


class ModelHandle:
    """A dense model and its processor; what can be checked before weights are loaded, is.

    Args:
        model: A name, a place to load from, or a model in memory.
        processor: Of a model in memory; overrides the checkpoint's otherwise.
        options: How to load it.

    Attributes:
        name: What plans call the model: no machine path.
        processor: For the model, its settings settled.

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
            self.name = _name_of(model)
            self.processor = settled(processor, model.config, self.name)
            self.model = model.eval()
            return
        source = model if isinstance(model, ModelSource) else resolve(str(model))
        self._source, self.name = source, source.name
        self._checkpoint = Checkpoint.open(fetch(source))  # before anything takes long
        if processor is not None:
            self.processor = settled(processor, self._checkpoint.config, self.name)
        else:
            self.processor = load_processor(
                str(self._checkpoint.path), trust_remote_code=options.trust_remote_code
            )

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, in eval mode; loaded at the first use."""
        dtype = torch_dtype(self._options.dtype)
        model = load_dense(self._source, checkpoint=self._checkpoint, dtype=dtype)
        return model.to(self._options.device)


def _name_of(model: PreTrainedModel) -> str:
    """A name for a model in memory: the hub id that it was loaded from, a directory's own name."""
    name = model.config.name_or_path or model.name_or_path
    if not name:
        return type(model).__name__
    try:
        return resolve(name).name
    except ModelError:  # moved since, or nothing that yopo could load
        return Path(name).name or type(model).__name__
