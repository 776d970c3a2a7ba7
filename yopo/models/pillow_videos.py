"""The video half of a Qwen-VL processor, made from its image half, which needs only Pillow.

A frame is patched as an image, whose patches the image half repeats in time; here two frames share
a patch, as in the stock video half. That half needs torchvision, and its resizing rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MOST_TOKENS = 768
"""Visual tokens of one frame, as in Qwen2-VL's video half; an image may have many more."""


class Decoded(Protocol):
    """What is known of a video's frames."""

    @property
    def indices(self) -> Sequence[int]:
        """Places of the frames."""

    @property
    def fps(self) -> float:
        """Frames per second of the video."""

    @property
    def total(self) -> int:
        """Frames of the video."""


class PillowVideos:
    """Called by a stock processor for its videos, in the place of its own video half.

    Args:
        images: The processor's image half.
        about: Of each video, where its frames are from.
    """

    def __init__(self, images: Any, about: Sequence[Decoded]):
        self.merge_size: int = images.merge_size
        self.temporal_patch_size: int = images.temporal_patch_size
        self._images, self._about = images, about

    def __call__(self, videos: Sequence[Sequence[Image]], **_: Any) -> dict[str, Any]:
        """Patches of videos, and their steps, rows and columns.

        Args:
            videos: Frames of each, a multiple of ``temporal_patch_size`` in number.
        """
        import torch

        made = [self._patched(list(frames)) for frames in videos]
        return {
            "pixel_values_videos": torch.cat([patches for patches, _ in made]),
            "video_grid_thw": torch.tensor([grid for _, grid in made]),
            "video_metadata": [_metadata(each) for each in self._about],
        }

    def _patched(self, frames: list[Image]) -> tuple[torch.Tensor, list[int]]:
        """((patches, values) and (steps, rows, columns) of the patches) of one video."""
        images = self._images
        side, step = images.patch_size * self.merge_size, self.temporal_patch_size
        most = min(images.size["longest_edge"], MOST_TOKENS * side**2)
        size = {"shortest_edge": min(images.size["shortest_edge"], most), "longest_edge": most}
        made = images(frames, size=size, return_tensors="pt")
        _, high, wide = made["image_grid_thw"][0].tolist()
        # (frames, places, channels, repeated in time, pixels): one of the repetitions is enough
        shape = (len(frames), high * wide, -1, step, images.patch_size**2)
        each = made["pixel_values"].reshape(shape)[:, :, :, 0]
        steps = each.unflatten(0, (-1, step)).permute(0, 2, 3, 1, 4)
        count = len(frames) // step
        return steps.reshape(count * high * wide, -1), [count, high, wide]


def _metadata(of: Decoded) -> SimpleNamespace:
    """What stock processors write time stamps from, by transformers' names."""
    sampled = len(of.indices) / of.total * of.fps
    return SimpleNamespace(fps=of.fps, sampled_fps=sampled, frames_indices=list(of.indices))
