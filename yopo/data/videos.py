"""Videos of pairs: frames at a rate, decoded by PyAV (the extra ``yopo[video]``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yopo.data.left_out import BadPair, refuse_missing

if TYPE_CHECKING:
    from PIL.Image import Image

FPS = 2.0
"""Frames per second that are looked at, as in Qwen-VL's own preprocessing."""

MAX_FRAMES = 64
"""Frames of one video at most: as a vision tower merges two, 32 steps of up to 768 tokens."""

MAX_FRAME_PIXELS = 64 << 20
"""Maximum pixels of a frame, as of an image."""

TOGETHER = 2
"""Frames that a vision tower merges into one step: their number is a multiple of it."""


@dataclass(frozen=True)
class Frames:
    """Frames of one video.

    Attributes:
        images: RGB, in order of time; an even number of them.
        indices: Their places among all frames of the video.
        fps: Frames per second of the video.
        total: Its number of frames.
    """

    images: list[Image]
    indices: list[int]
    fps: float
    total: int


@dataclass(frozen=True)
class VideoRef:
    """A video that is only read and decoded when it is needed.

    Attributes:
        source: A local path.
        label: Name in messages, with its row: ``pairs.jsonl:3: video cat.mp4``.
    """

    source: Path = field(repr=False)
    label: str

    def check(self) -> None:
        """Refuse a path without a file, without decoding anything.

        Raises:
            BadPair: There is no such file.
        """
        remedy = "Paths of videos are relative to the folder of the file that names them."
        refuse_missing(self.source, self.label, "video", remedy)

    def load(self, fps: float = FPS, max_frames: int = MAX_FRAMES) -> Frames:
        """Decode frames evenly over the video's length.

        Args:
            fps: About how many per second.
            max_frames: At most how many.

        Raises:
            BadPair: There is no such file, it cannot be decoded, or PyAV is not installed.
        """
        self.check()
        try:
            import av
        except ImportError as error:
            raise BadPair(
                f"{self.label}: decoding videos needs PyAV, which is not installed.",
                reason="with a video, which PyAV would decode",
                remedy="pip install 'yopo[video]'.",
            ) from error
        try:
            return self._decoded(av, fps, max_frames)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._unreadable(str(error) or type(error).__name__) from error

    def _decoded(self, av: Any, fps: float, max_frames: int) -> Frames:
        """Two passes: counting frames, of which headers may say nothing, then taking some."""
        with av.open(str(self.source)) as file:
            if not file.streams.video:
                raise self._unreadable("it has no video stream")
            stream = file.streams.video[0]
            if stream.width * stream.height > MAX_FRAME_PIXELS:
                raise self._unreadable(f"it has frames of {stream.width} x {stream.height} pixels")
            rate = float(stream.average_rate or stream.guessed_rate or 0) or 1.0
            total = sum(1 for _ in file.decode(stream))
        if total == 0:
            raise self._unreadable("it has no frame")
        indices = chosen(total, rate, fps, max_frames)
        with av.open(str(self.source)) as file:
            wanted, images = set(indices), {}
            for index, frame in enumerate(file.decode(video=0)):
                if index in wanted:
                    images[index] = frame.to_image()
        return Frames([images[index] for index in indices], indices, rate, total)

    def _unreadable(self, problem: str) -> BadPair:
        return BadPair(
            f"{self.label}: cannot be decoded: {problem}.",
            reason="with a video that cannot be decoded",
            remedy="Replace the file, or remove the pair from the data.",
        )


def chosen(total: int, rate: float, fps: float, max_frames: int) -> list[int]:
    """Places of frames that lie evenly over a video; the last is repeated in a video of one.

    Args:
        total: Frames of the video.
        rate: Frames per second of the video.
        fps: Frames per second to take.
        max_frames: At most how many, rounded down to a multiple of ``TOGETHER``.
    """
    most = max(max_frames // TOGETHER, 1) * TOGETHER
    count = round(total / rate * fps / TOGETHER) * TOGETHER
    count = min(max(count, TOGETHER), most, -(-total // TOGETHER) * TOGETHER)
    return [min(place * total // count, total - 1) for place in range(count)]
