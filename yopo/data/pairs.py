"""Image-question pairs for calibration and evaluation, decoded only when used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from yopo.data.left_out import BadPair, refuse_missing
from yopo.data.videos import VideoRef
from yopo.support.errors import DataError, YopoError
from yopo.support.reading import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_IMAGE_BYTES = 256 << 20
"""Maximum size of an image file."""

MAX_PIXELS = 64 << 20
"""Maximum pixels of an image; decoding that many takes some 600 MB. A 2 MB file can hold more."""

MAX_ASPECT = 200
"""Maximum aspect ratio: processors scale the shorter side up to hundreds of pixels."""

_PROGRAMS = ("EPS", "WMF")
"""Formats that are programs, for which Pillow calls other software."""


@dataclass(frozen=True)
class ImageRef:
    """An image that is only read and decoded when it is needed.

    Attributes:
        source: A local path, a remote address that ``datasets`` can read (``hf://``, ``zip://``),
            the bytes of an image file, or a decoded image.
        label: Name in messages, with its row: ``pairs.jsonl:3: image cat.png``.
    """

    source: Path | str | bytes | Image = field(repr=False)
    label: str

    def check(self) -> None:
        """Refuse a local path without a file, without decoding anything.

        Raises:
            BadPair: There is no such file.
        """
        if isinstance(self.source, Path):
            remedy = "Image paths are relative to the folder of the file that names them."
            refuse_missing(self.source, self.label, "image", remedy)

    def load(self) -> Image:
        """Decode the image as RGB, upright according to its EXIF tag.

        Raises:
            DataError: The file is missing, truncated, too large, or not an image.
        """
        from PIL import Image, UnidentifiedImageError

        self.check()
        try:
            if isinstance(self.source, Image.Image):
                return self._upright(self.source)
            if isinstance(self.source, str):
                return self._upright(_read_remote(self.source))
            file, size = _opened(self.source)
            with file:
                if size > MAX_IMAGE_BYTES:
                    raise self._unreadable(
                        f"it has {size:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}"
                    )
                with warnings.catch_warnings():
                    # Pillow's own limits are wider than ours.
                    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                    image = Image.open(file)
                with image:
                    return self._upright(image)
        except UnidentifiedImageError as error:
            raise self._unreadable("not an image in a format that Pillow knows") from error
        except (YopoError, MemoryError):
            raise
        except Exception as error:  # decoders and the EXIF reader raise all kinds of errors
            raise self._unreadable(str(error) or type(error).__name__) from error

    def _upright(self, image: Image) -> Image:
        """Decode an image after checking its format and size, which needs no decoding."""
        width, height = image.size
        if image.format in _PROGRAMS:
            raise self._unreadable(f"{image.format} files are programs, which are not run")
        if width * height > MAX_PIXELS:
            raise self._unreadable(
                f"it has {width} x {height} pixels, more than the limit of {MAX_PIXELS:,}"
            )
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise self._unreadable(f"it is too narrow with {width} x {height} pixels")
        return _upright_rgb(image)

    def _unreadable(self, problem: str) -> BadPair:
        return BadPair(
            f"{self.label}: cannot be decoded: {problem}.",
            reason="with an image that cannot be decoded",
            remedy="Replace the file, or remove the pair from the data.",
        )


def _opened(source: Path | bytes) -> tuple[BinaryIO, int]:
    if isinstance(source, bytes):
        return BytesIO(source), len(source)
    return open_regular(source, error=DataError)


def _read_remote(address: str) -> Image:
    """Fetch and decode an image of a streamed dataset, with the hub token if it needs one."""
    import datasets

    return datasets.Image().decode_example({"path": address, "bytes": None})


def _upright_rgb(image: Image) -> Image:
    """Make an image upright RGB as stock processors do: alpha is dropped, not blended."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # plain conversion clips 16 bits: all white
        upright = upright.point(lambda value: value / 256).convert("L")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


@dataclass(frozen=True)
class ResizedRef(ImageRef):
    """An image of another size than its source's.

    Attributes:
        scale: Factor of both sides.
    """

    scale: float = 1.0

    def load(self) -> Image:
        """Decode and resize; errors as for any image."""
        image = super().load()
        width, height = (max(1, round(self.scale * side)) for side in image.size)
        if width * height > MAX_PIXELS:
            raise self._unreadable(f"resized, it would have {width} x {height} pixels")
        return image.resize((width, height), _BICUBIC)


_BICUBIC = 3
"""Pillow's ``Resampling.BICUBIC``, without importing it."""


@dataclass(frozen=True)
class Pair:
    """Images or videos, a question about them, and its answers if they are known.

    Attributes:
        images: In prompt order; at least one, if there is no video.
        question: Only the question: no template, no image placeholder.
        answers: Accepted answers; empty when the data has none.
        kind: The kind of question, if the data states it.
        id: The data's own id, otherwise the row's number.
        where: Its location, for messages: ``pairs.jsonl:3``.
        videos: After the images.
    """

    images: tuple[ImageRef, ...]
    question: str
    answers: tuple[str, ...]
    kind: str | None
    id: str
    where: str
    videos: tuple[VideoRef, ...] = ()


@dataclass(frozen=True)
class Pairs:
    """Pairs of one source; every iteration yields the same ones in the same order.

    Attributes:
        name: File name, hub id or ``demo:split``, for the plan's provenance; no machine path.
        total: Number of pairs per iteration (an upper bound for streams), or None when unknown.
        digest: SHA-256 of the JSON text, the hub's commit, or None if neither is available.
    """

    name: str
    total: int | None
    digest: str | None
    read: Callable[[], Iterator[Pair]] = field(repr=False)

    def __iter__(self) -> Iterator[Pair]:
        return self.read()


Data = str | Path | Pairs | Sequence[str | Path] | Sequence[Mapping[str, Any]]
"""A source of pairs: its name, several names, pairs that are already open, or rows in memory."""
