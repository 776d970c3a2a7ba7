"""Sets a processor's model-dependent settings from the model where its files are silent or wrong.

LLaVA's processors count placeholders by the tower's patch size and class token. Many published
directories lack these in processor_config.json, or have defaults that do not match the model: the
stock processor then fails, or writes a prompt that the model refuses.
"""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from yopo.data.videos import FPS, MAX_FRAMES
from yopo.models.registry import family_of
from yopo.support.console import note
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

logger = logging.getLogger(__name__)

_NEEDED = ("patch_size", "vision_feature_select_strategy")
"""Settings without which a processor that has them cannot count placeholders."""


def settle(processor: ProcessorMixin, location: str, **options: Any) -> None:
    """Set a processor's settings to the model's, in place, and note any differences.

    Args:
        processor: Just loaded.
        location: The directory or hub id that it was loaded from.
        **options: Options of ``from_pretrained`` (``revision``, ``local_files_only``).

    Raises:
        ModelError: A setting is missing in both the processor's files and the model's
            configuration, or the model's visual tokens cannot be located.
    """
    config, family = _config(location, options), None
    if config is not None:
        with suppress(ModelError):  # loading the model reports it
            family = family_of(config)
    if config is None or family is None:
        missing = [name for name in _NEEDED if getattr(processor, name, "") is None]
        if missing:
            raise ModelError(
                f"{location}: the processor lacks {missing[0]}, and there is no config.json of a "
                "supported model to take it from.",
                remedy="The directory needs the model's config.json, or a processor_config.json.",
            )
        return
    _apply(processor, config, location)


def settled(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> ProcessorMixin:
    """A copy of a processor in memory with the settings of a model.

    Args:
        processor: The user's processor, which is not changed.
        config: The model's configuration.
        name: The model's name in messages.

    Raises:
        ModelError: Not a processor for images and text, or the model's family is not supported.
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
    if family.takes_videos:  # settings of ours, which a user may change like the processor's
        vars(processor).update(fps=FPS, max_frames=MAX_FRAMES)
    if changed:
        listed = ", ".join(f"{key} {value}" for key, value in changed.items())
        note(f"{name}: the processor's files lack or contradict values in config.json: {listed}.")


def _config(location: str, options: dict[str, Any]) -> PreTrainedConfig | None:
    """The model's configuration; None if it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(location, **{**options, "trust_remote_code": False})
    except Exception as error:  # many kinds; loading the model reports it
        logger.debug("%s: no configuration: %s", location, error)
        return None
