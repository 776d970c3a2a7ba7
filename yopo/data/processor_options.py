"""The user's settings of a processor, such as the size of images: calibrate as you serve.

The number of visual tokens of an image follows from them: for Qwen-VL from a range of pixels, for
InternVL from a range of tiles. A LLaVA sees every image at one size, and the tiles of LLaVA-NeXT
are fixed in the model's configuration.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from yopo.support.documents import describe
from yopo.support.errors import ModelError, suggest

if TYPE_CHECKING:
    from transformers import ProcessorMixin

PIXELS = ("min_pixels", "max_pixels")
"""Settings that mean the same for every family that has them: the area of an image."""


def parsed(text: str) -> tuple[str, Any]:
    """Parse ``key=value``, the value as JSON where it is JSON.

    Raises:
        ModelError: It has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ModelError(
            f"A processor option must look like max_patches=6, found '{text}'.",
            remedy="Give --processor KEY=VALUE, once per option.",
        )
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value.strip()


def with_options(
    processor: ProcessorMixin, options: Mapping[str, Any], name: str
) -> ProcessorMixin:
    """A copy of a processor with the user's settings; the same one, if there are none.

    Args:
        processor: The model's.
        options: ``min_pixels``, ``max_pixels``, and any attribute of the processor or its image
            processor.
        name: The model's name in messages.

    Raises:
        ModelError: It has no such setting, or of another type, or images have one size only.
    """
    if not options:
        return processor
    processor = copy.copy(processor)
    processor.image_processor = copy.deepcopy(processor.image_processor)
    pixels = {key: value for key, value in options.items() if key in PIXELS}
    if pixels:
        _set_pixels(processor.image_processor, pixels, name)
    for key, value in options.items():
        if key not in PIXELS:
            _set(processor, key, value, name)
    return processor


def _set_pixels(images: Any, pixels: Mapping[str, int], name: str) -> None:
    """Limit the area of images, in whichever way an image processor does it."""
    if not all(isinstance(value, int) and value > 0 for value in pixels.values()):
        raise ModelError(
            f"{name}: min_pixels and max_pixels must be positive whole numbers.",
            remedy="Give areas: --max-pixels 1003520 is 1280 tokens of 28 x 28 pixels.",
        )
    size = dict(images.size) if images.size is not None else {}
    if hasattr(images, "max_patches") and {"height", "width"} <= set(size):
        tile = size["height"] * size["width"]
        if "max_pixels" in pixels:
            images.max_patches = max(1, pixels["max_pixels"] // tile)
        if "min_pixels" in pixels:
            images.min_patches = -(-pixels["min_pixels"] // tile)
        low, high = images.min_patches, images.max_patches
    elif hasattr(images, "merge_size"):
        size["longest_edge"] = pixels.get("max_pixels", size.get("longest_edge"))
        size["shortest_edge"] = pixels.get("min_pixels", size.get("shortest_edge"))
        images.size = type(images.size)(**size)
        low, high = size["shortest_edge"], size["longest_edge"]
    else:
        raise ModelError(
            f"{name}: its processor ({type(images).__name__}) has no range of image sizes.",
            remedy="Its sizes are fixed by the model: leave --min-pixels and --max-pixels out, or "
            "resize the images (--grids).",
        )
    if low > high:
        raise ModelError(
            f"{name}: the smallest size of an image ({low}) is larger than the largest ({high}).",
            remedy="Give both --min-pixels and --max-pixels.",
        )


def _set(processor: ProcessorMixin, key: str, value: Any, name: str) -> None:
    images = processor.image_processor
    known = {**_plain(processor.__dict__), **_plain(images.to_dict())}
    if key not in known:
        raise ModelError(
            f"{name}: the processor has no option '{key}'.", remedy=suggest(key, known)
        )
    owner = images if key in images.to_dict() else processor
    former = known[key]
    fits = former is None or isinstance(value, type(former))
    fits = fits or (isinstance(former, float) and isinstance(value, int))
    if not fits or (isinstance(value, bool) and not isinstance(former, bool | None)):
        raise ModelError(
            f"{name}: the processor's {key} must be like {describe(former)}, found "
            f"{describe(value)}.",
            remedy=f"Write it as JSON: --processor '{key}={json.dumps(former)}'.",
        )
    held: Any = getattr(owner, key, None)  # a size may have a type of its own
    if held is not None and isinstance(value, dict):
        value = type(held)(**value)
    setattr(owner, key, value)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can be written as JSON."""
    kinds = (bool, int, float, str, dict, list, tuple, type(None))
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if isinstance(value, kinds) and not key.startswith("_") and key != "chat_template"
    }
