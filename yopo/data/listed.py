"""Pairs whose rows are in memory: given as such, read from CSV, or made from a folder of images."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from yopo.data.drawing import Draw, draw
from yopo.data.left_out import BadPair, LeftOut
from yopo.data.pairs import Pair, Pairs
from yopo.data.rows import pair_from_row
from yopo.support.console import note
from yopo.support.errors import DataError, printable
from yopo.support.reading import read_bytes

MAX_CSV = 1 << 30
"""Maximum bytes of a CSV file, which is read whole."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

QUESTIONS = (
    ("description", "Describe this image in detail."),
    ("objects", "What objects are in this image?"),
    ("short", "What is this image about? Answer in one sentence."),
    ("text", "What text is written in this image?"),
    ("count", "How many people are in this image?"),
    ("color", "What are the main colors of this image?"),
    ("position", "What is in the center of this image?"),
    ("reasoning", "What could happen next in this image, and why?"),
)
"""(kind, question) that pictures without questions are asked, in turn: calibration needs prompts,
and no answers."""


def open_rows(
    rows: Sequence[Any],
    how: Draw,
    *,
    name: str,
    folder: Path,
    where: Callable[[int], str],
    source: str | None = None,
    digest: str | None = None,
) -> Pairs:
    """Open rows in memory.

    Args:
        rows: Mappings, as in any file of pairs.
        how: Which are drawn.
        name: The source's name in plans.
        folder: What image paths are relative to.
        where: A row's location in messages, from its number.
        source: The source's name in messages; None: ``name``.
        digest: Of the source, if there is one.

    Raises:
        DataError: No row can be used.
    """
    source, left_out = source or name, LeftOut(source or name, strict=how.strict)
    pairs: dict[int, Pair] = {}
    for number, row in enumerate(rows):
        try:
            pairs[number] = pair_from_row(row, where=where(number), number=number, folder=folder)
        except BadPair as error:
            left_out.add(error)

    def read(numbers: Sequence[int]) -> Iterator[tuple[int, Pair]]:
        return ((number, pairs[number]) for number in numbers)

    kinds = [pair.kind for pair in pairs.values()]
    kept = draw(how, source, list(pairs), kinds, read, left_out, is_scanned=True)
    found = [pairs[number] for number in kept]
    return Pairs(name, total=len(found), digest=digest, read=lambda: iter(found))


def open_memory(rows: Sequence[Mapping[str, Any]], how: Draw) -> Pairs:
    """Open the caller's rows; image paths are relative to the working directory."""
    rows = list(rows)
    if not rows:
        raise DataError("There are no rows in memory.")
    return open_rows(rows, how, name="rows in memory", folder=Path.cwd(), where="row {}".format)


def open_csv(path: Path, how: Draw) -> Pairs:
    """Open a CSV file with a header; commas, semicolons or tabs separate its columns.

    Raises:
        DataError: Not UTF-8, without a header or rows, or too long.
    """
    content = read_bytes(path, limit=MAX_CSV, error=DataError)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text.") from error
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restkey="")
    lines, rows = [], []
    try:
        for row in reader:
            lines.append(reader.line_num)
            rows.append({name: value for name, value in row.items() if name})
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}.") from error
    return open_rows(
        rows,
        how,
        name=printable(path.name),
        source=str(path),
        folder=path.parent.resolve(),
        where=lambda number: f"{path}:{lines[number]}",
        digest=hashlib.sha256(content).hexdigest(),
    )


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, in the order of their names."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path.relative_to(folder) for path in found if path.is_file())


def open_images(folder: Path, images: Sequence[Path], how: Draw) -> Pairs:
    """Ask the images of a folder that has no questions one of ``QUESTIONS`` each.

    Args:
        folder: The folder.
        images: From ``images_in``.
        how: Which are drawn.

    Raises:
        DataError: No image can be read.
    """
    note(
        f"{folder}: {len(images)} images and no metadata.jsonl: each is asked one of "
        f"{len(QUESTIONS)} general questions. For your own, write a line "
        '{"file_name": "a.png", "question": "..."} per image into metadata.jsonl there.'
    )
    rows = []
    for number, image in enumerate(images):
        kind, question = QUESTIONS[number % len(QUESTIONS)]
        rows.append({"image": str(image), "question": question, "kind": kind})
    return open_rows(
        rows,
        how,
        name=folder.resolve().name,
        source=str(folder),
        folder=folder.resolve(),
        where=lambda number: f"{folder}/{images[number]}",
    )
