"""Finds image-question pairs by what the user calls them: demo, file, directory or hub dataset."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from yopo.calibration.pairs import ImageRef, Pair, Pairs
from yopo.calibration.rows import pair_from_row
from yopo.calibration.sampling import check_samples, chosen
from yopo.demo import SETS
from yopo.errors import DataError, suggest

DEFAULT_DEMO_PAIRS = 256
_SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[^:/]+){0,2}")
_FORMS = (
    "Give a .jsonl, .json or .parquet file, a directory (parquet, image folder with metadata, "
    "save_to_disk), a hub id org/name[:split], or demo:calibration."
)


def open_pairs(
    data: str | None, *, samples: int | None, seed: int, split: str | None = None
) -> Pairs:
    """Open image-question pairs; what is wrong with the data shows now, if it can be seen cheaply.

    Of a JSON file every row is checked here, and that the images of the drawn pairs exist; of a
    table or stream the first row, the others when they are read. Images are decoded when used.

    Args:
        data: ``None`` (demo pairs about scenes), ``demo:SET`` (one of ``yopo.demo.SETS``), a
            ``.jsonl``, ``.json`` or ``.parquet`` file, a directory, or a hub id
            ``org/name[:split]`` or ``org/name:config:split``. A directory may carry its split as
            ``DIR:split``.
        samples: How many pairs to draw; None means all (256 of the demo pairs).
        seed: Decides which are drawn.
        split: Which split, where ``data`` does not name it.

    Returns:
        Pairs that can be iterated several times with the same result.

    Raises:
        DataError: No such source, or its first bad pair: nothing is skipped silently.
    """
    check_samples(samples)
    if data is None or data.startswith("demo:"):
        return _open_demo((data or "").partition(":")[2] or split, samples, seed)
    path, named = _path_and_split(data)
    split = named or split
    if path.is_dir() and data:
        from yopo.calibration.tables import open_directory

        return open_directory(path, samples=samples, seed=seed, split=split)
    if path.suffix.lower() in _SUFFIXES or path.exists():
        return _open_file(path, samples, seed, split)
    looks_local = path.is_absolute() or data.startswith((".", "~"))
    if _HUB_ID.fullmatch(data) and not looks_local:
        return _open_hub(data, samples, seed, split)
    raise DataError(f"{data}: no such file or directory.", remedy=_FORMS)


def _path_and_split(data: str) -> tuple[Path, str | None]:
    """Read ``DIR:split`` where the part before the colon is a directory."""
    path = Path(data).expanduser()
    head, _, tail = data.rpartition(":")
    if not path.exists() and head and Path(head).expanduser().is_dir():
        return Path(head).expanduser(), tail
    return path, None


def _open_hub(data: str, samples: int | None, seed: int, split: str | None) -> Pairs:
    from yopo.calibration.tables import open_hub

    repository, *rest = data.split(":")
    config = rest[0] if len(rest) == 2 else None
    return open_hub(repository, config, rest[-1] if rest else split, samples=samples, seed=seed)


def _open_demo(name: str | None, samples: int | None, seed: int) -> Pairs:
    name = name or "calibration"
    if name not in SETS:
        raise DataError(f"The demo pairs have no split '{name}'.", remedy=suggest(name, SETS))
    count = samples or DEFAULT_DEMO_PAIRS
    read = partial(_read_demo, name, count, seed)
    return Pairs(name=f"demo:{name}", total=count, digest=None, read=read)


def _read_demo(name: str, count: int, seed: int) -> Iterator[Pair]:
    from yopo.demo.pairs import pairs_of

    for index, pair in enumerate(pairs_of(name, count, seed=seed)):
        where = f"demo:{name} pair {index}"
        image = ImageRef(pair.image, f"{where}: image {pair.id}")
        yield Pair((image,), pair.question, (pair.answer,), pair.kind, pair.id, where)


def _open_file(path: Path, samples: int | None, seed: int, split: str | None) -> Pairs:
    if not path.exists():
        raise DataError(f"{path}: no such file.", remedy=_FORMS)
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{path}: not a kind of file that pairs are read from.", remedy=_FORMS)
    if split is not None:
        raise DataError(f"{path}: a single file has no splits, so none can be called '{split}'.")
    if path.suffix.lower() == ".parquet":
        from yopo.calibration.tables import open_parquet

        return open_parquet(path, samples=samples, seed=seed)
    return _open_json(path, samples, seed)


def _open_json(path: Path, samples: int | None, seed: int) -> Pairs:
    """Read every row of a JSON or JSONL file, and look for the images of the chosen ones."""
    text, digest = _read_text(path)
    folder = path.parent.resolve()
    pairs = [
        pair_from_row(row, where=f"{path}:{line}", number=number, folder=folder)
        for number, (line, row) in enumerate(_json_rows(text, path))
    ]
    if not pairs:
        raise DataError(f"{path}: holds no pairs.")
    kept = [pairs[number] for number in chosen(len(pairs), samples, seed, where=str(path))]
    for pair in kept:
        for image in pair.images:
            image.check()
    return Pairs(name=path.name, total=len(kept), digest=digest, read=partial(iter, kept))


def _read_text(path: Path) -> tuple[str, str]:
    """Return a file's text and the SHA-256 of its bytes."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, value): the items of one JSON list, or one value per line."""
    if text.lstrip().startswith("["):
        yield from _list_items(text, path)
        return
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                value = json.loads(content)
            except json.JSONDecodeError as error:
                raise _not_json(path, line, error) from error
            yield line, value


def _list_items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield a JSON list's items, each with the line that it starts on."""
    space = re.compile(r"\s*")
    try:
        json.loads(text)  # one strict pass: the loop below may then rely on the commas
    except json.JSONDecodeError as error:
        raise _not_json(path, error.lineno, error) from error
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = space.match(text, position).end()
        if text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        value, position = decoder.raw_decode(text, position)
        yield line, value
        position = space.match(text, position).end()
        position += text[position] == ","


def _not_json(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(
        f"{path}:{line}: not JSON: {error.msg} (column {error.colno}).",
        remedy="Write one object per line, or all of them in one list.",
    )
