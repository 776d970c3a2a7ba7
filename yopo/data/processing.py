"""What a processor makes of prompts with images and videos: padded tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from yopo.data.pairs import Pair
from yopo.data.videos import FPS, MAX_FRAMES

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import ProcessorMixin


def images_of(pair: Pair) -> list[Image]:
    """The decoded images of a pair, in prompt order."""
    return [image.load() for image in pair.images]


def processed(
    processor: ProcessorMixin, prompts: Sequence[str], pairs: Sequence[Pair]
) -> dict[str, torch.Tensor]:
    """The processor's output for prompts and the media of their pairs, left-padded.

    Videos are decoded at the processor's ``fps`` and ``max_frames`` (``--processor fps=1``).

    Raises:
        DataError: An image or a video cannot be decoded.
        ValueError: The processor's own.
    """
    images = [images_of(pair) for pair in pairs]
    videos = [video for pair in pairs for video in pair.videos]
    if not videos:
        return padded(processor, prompts, {"images": images})
    from yopo.models.pillow_videos import PillowVideos

    rate, most = getattr(processor, "fps", FPS), getattr(processor, "max_frames", MAX_FRAMES)
    frames = [video.load(rate, most) for video in videos]
    processor = copy.copy(processor)
    processor.video_processor = PillowVideos(processor.image_processor, frames)
    flat = [image for row in images for image in row]
    media: dict[str, Any] = {"images": flat} if flat else {}
    return padded(processor, prompts, media | {"videos": [each.images for each in frames]})


def padded(
    processor: ProcessorMixin, prompts: Sequence[str], media: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The processor's output for prompts and media that are decoded already, left-padded.

    Args:
        processor: From ``load_processor``.
        prompts: At least one, with a placeholder per image or video.
        media: ``images`` of each prompt, or ``videos``, as the processor takes them.
    """
    bos = processor.tokenizer.bos_token
    options = {
        "padding": True,
        "padding_side": "left",
        "add_special_tokens": not (bos and prompts[0].startswith(bos)),  # templates may add it
    }
    return dict(processor(text=list(prompts), **media, text_kwargs=options, return_tensors="pt"))


def placed(
    inputs: Mapping[str, torch.Tensor], device: torch.device | str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Inputs on a device, pixels in a model's precision; token ids, masks and times keep theirs."""
    return {
        name: each.to(device, dtype if _are_pixels(name, each) else None)
        for name, each in inputs.items()
    }


def _are_pixels(name: str, values: torch.Tensor) -> bool:
    return name.startswith("pixel") and values.is_floating_point()
