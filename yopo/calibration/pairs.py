"""Image-question pairs: what calibration and evaluation measure on, decoded only when used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from yopo.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageRef:
    """An image that is read and decoded when it is needed, not before.

    Attributes:
        source: A local path, a remote address that ``datasets`` can read (``hf://``, ``zip://``),
            the bytes of an image file, or a decoded image.
        label: What messages call it, with the row it stands in: ``pairs.jsonl:3: image cat.png``.
    """

    source: Path | str | bytes | Image = field(repr=False)
    label: str

    def check(self) -> None:
        """Refuse a local path where no file is, without decoding anything.

        Raises:
            DataError: There is no such file.
        """
        if isinstance(self.source, Path) and not self.source.is_file():
            raise DataError(
                f"{self.label}: there is no file {self.source}.",
                remedy="Image paths are relative to the folder of the file that names them.",
            )

    def load(self) -> Image:
        """Decode the image, upright as its EXIF tag says, as RGB.

        Raises:
            DataError: The file is missing, cut off, or no image.
        """
        from PIL import Image, UnidentifiedImageError

        self.check()
        try:
            if isinstance(self.source, Image.Image):
                return _upright_rgb(self.source)
            if isinstance(self.source, str):
                return _upright_rgb(_read_remote(self.source))
            is_bytes = isinstance(self.source, bytes)
            with Image.open(BytesIO(self.source) if is_bytes else self.source) as image:
                return _upright_rgb(image)
        except UnidentifiedImageError as error:
            raise self._unreadable("not an image in a format that Pillow knows") from error
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise self._unreadable(str(error) or type(error).__name__) from error

    def _unreadable(self, problem: str) -> DataError:
        return DataError(
            f"{self.label}: cannot be decoded: {problem}.",
            remedy="Replace the file, or take the pair out of the data.",
        )


def _read_remote(address: str) -> Image:
    """Fetch and decode an image of a streamed dataset, with the hub's token where it needs one."""
    import datasets

    return datasets.Image().decode_example({"path": address, "bytes": None})


def _upright_rgb(image: Image) -> Image:
    """Turn an image upright and into RGB as stock processors do: alpha is dropped, not blended."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # plain conversion clips 16 bits: all white
        upright = upright.point(lambda value: value / 256).convert("L")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


@dataclass(frozen=True)
class Pair:
    """One or more images, a question about them, and its answers if they are known.

    Attributes:
        images: In the order of the prompt, at least one.
        question: The question alone: no template, no image placeholder.
        answers: Accepted answers; empty when the data has none.
        kind: What kind of question it is, if the data says so.
        id: The data's own id, else the row's number.
        where: Where it stands, for messages: ``pairs.jsonl:3``.
    """

    images: tuple[ImageRef, ...]
    question: str
    answers: tuple[str, ...]
    kind: str | None
    id: str
    where: str


@dataclass(frozen=True)
class Pairs:
    """Pairs of one source; every iteration yields the same ones in the same order.

    Attributes:
        name: File name, hub id or ``demo:split``, for the plan's provenance; no machine path.
        total: How many an iteration yields (at most, for a stream), or None when unknown.
        digest: SHA-256 of the JSON text, the hub's commit, or None where neither is at hand.
    """

    name: str
    total: int | None
    digest: str | None
    read: Callable[[], Iterator[Pair]] = field(repr=False)

    def __iter__(self) -> Iterator[Pair]:
        return self.read()
