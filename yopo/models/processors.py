"""Processors without their video half, which needs torchvision; yopo only uses images.

Without torchvision, transformers refuses to build such a processor (Qwen2-VL, InternVL, ...),
although images are handled by Pillow.
"""

from __future__ import annotations

import logging
from functools import cache, wraps
from inspect import Parameter, signature
from typing import Any, cast

from transformers import AutoConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

logger = logging.getLogger(__name__)

VIDEO = "video_processor"


def load_without_videos(location: str, **options: Any) -> ProcessorMixin | None:
    """Load a model's processor for images and text.

    Args:
        location: A local directory or a hub id, with the model's configuration.
        **options: Options of ``from_pretrained`` (``revision``, ``local_files_only``,
            ``trust_remote_code``).

    Returns:
        The processor; None if there is no video half to leave out, or if anything else is missing.
    """
    try:
        config = AutoConfig.from_pretrained(location, **options)
        # The mapping is annotated for pairs of tokenizers, but this one holds classes.
        stock = cast("type[ProcessorMixin] | None", PROCESSOR_MAPPING.get(type(config), None))
        if stock is None or VIDEO not in stock.get_attributes():
            return None
        # mypy compares the class's own __hash__, which takes an object, to Hashable's.
        without = image_class(stock)  # type: ignore[arg-type]
        processor = without.from_pretrained(location, **options)
        # If the tokenizer's files are missing, transformers creates an empty one.
        known = getattr(processor, "image_token_id", None)
        return processor if known == config.image_token_id else None
    except Exception as error:  # many kinds; the caller reports the original one
        logger.debug("%s: no processor without videos either: %s", location, error)
        return None


@cache
def image_class(stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The subclass of a processor class that has no video processor.

    It keeps the name, so that it saves itself as the stock processor. The stock ``__init__`` still
    passes its third part, None, to transformers, which takes only the parts named here.
    """

    @wraps(stock.__init__)
    def initialize(self: ProcessorMixin, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **{VIDEO: None, **kwargs})

    def get_attributes(cls: type[ProcessorMixin]) -> list[str]:
        return [name for name in stock.get_attributes() if name != VIDEO]

    members: dict[str, Any] = {
        "get_attributes": classmethod(get_attributes),
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
    }
    if signature(stock.__init__).parameters[VIDEO].default is Parameter.empty:  # SmolVLM
        members["__init__"] = initialize
    return type(stock.__name__, (stock,), members)
