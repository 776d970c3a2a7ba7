"""What a processor must know of the model, filled in from the model where its files do not say.

LLaVA's processors count placeholders by the tower's patch size and class token. Many published
directories hold these in no processor_config.json, or as defaults that are not the model's: the
stock processor then fails, or writes a prompt that the model refuses.
"""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from yopo.models.registry import family_of
from yopo.support.console import note
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

logger = logging.getLogger(__name__)

_NEEDED = ("patch_size", "vision_feature_select_strategy")
"""Settings without which no placeholder can be counted, by processors that have them."""


def settle(processor: ProcessorMixin, location: str, **options: Any) -> None:
    """Set a processor's settings to the model's, in place, and say so where they differed.

    Args:
        processor: Just loaded.
        location: The directory or hub id that it was loaded from.
        **options: Of ``from_pretrained`` (``revision``, ``local_files_only``).

    Raises:
        ModelError: A setting is missing and the model's configuration does not tell it, or the
            model's visual tokens cannot be located.
    """
    config, family = _config(location, options), None
    if config is not None:
        with suppress(ModelError):  # whoever loads the model tells the user
            family = family_of(config)
    if config is None or family is None:
        missing = [name for name in _NEEDED if getattr(processor, name, "") is None]
        if missing:
            raise ModelError(
                f"{location}: neither the processor's files nor a config.json of a supported model "
                f"say what its {missing[0]} is.",
                remedy="The directory needs the model's config.json, or a processor_config.json.",
            )
        return
    _apply(processor, config, location)


def settled(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> ProcessorMixin:
    """A processor in memory with the settings of a model; a copy where they differ.

    Args:
        processor: Somebody's own, which is left as it is.
        config: The model's.
        name: What messages call the model.

    Raises:
        ModelError: No processor for images and text, or the model is of no supported family.
    """
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(
            f"{name}: found a {type(processor).__name__}, not a processor for images and text.",
            remedy="Pass what AutoProcessor.from_pretrained loads.",
        )
    processor = copy.copy(processor)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer = copy.deepcopy(processor.tokenizer)
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    _apply(processor, config, name)
    return processor


def _apply(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> None:
    family = family_of(config)
    family.check_vision(config)
    changed = {
        key: value
        for key, value in family.processor_settings(config).items()
        if hasattr(processor, key) and getattr(processor, key) != value
    }
    for key, value in changed.items():
        setattr(processor, key, value)
    if changed:
        listed = ", ".join(f"{key} {value}" for key, value in changed.items())
        note(f"{name}: the processor's files lack or contradict what config.json says: {listed}.")


def _config(location: str, options: dict[str, Any]) -> PreTrainedConfig | None:
    """The model's configuration; None if there is none that can be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(location, **{**options, "trust_remote_code": False})
    except Exception as error:  # many kinds; whoever loads the model tells the user
        logger.debug("%s: no configuration: %s", location, error)
        return None
