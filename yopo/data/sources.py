"""Opens image-question pairs by name: demo, file, directory, hub dataset, or several of them."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from yopo.data.drawing import DEFAULT_SAMPLES, Draw, draw
from yopo.data.json_rows import JsonRows
from yopo.data.left_out import BadPair, LeftOut
from yopo.data.listed import open_csv, open_memory
from yopo.data.mixing import Part, mixed, parts_of
from yopo.data.pairs import Data, ImageRef, Pair, Pairs
from yopo.data.rows import pair_from_row
from yopo.demo import SETS
from yopo.support.errors import DataError, printable, suggest

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[^:/]+){0,2}")
_FORMS = (
    "Give a .jsonl, .json, .parquet or .csv file, a directory (images, parquet, save_to_disk), a "
    "hub id org/name[:split], or demo:calibration."
)


def open_pairs(
    data: Data | None,
    *,
    samples: int | None,
    seed: int,
    split: str | None = None,
    strict: bool = False,
    videos: bool = False,
) -> Pairs:
    """Open image-question pairs, with all checks that do not need the model.

    Rows that cannot be used (no image, an image that cannot be decoded, ...) are counted and left
    out, with a warning that names the first; others are drawn in their place. For a JSON file every
    row is checked, for a table or stream the drawn ones. The drawn pairs' images are decoded once.

    Args:
        data: ``None`` (demo pairs about scenes), ``demo:SET`` (one of ``yopo.demo.SETS``), a
            ``.jsonl``, ``.json``, ``.parquet``, ``.csv`` or ``.tsv`` file, a directory, or a hub id
            ``org/name[:split]`` or ``org/name:config:split``. A directory may carry its split as
            ``DIR:split``. Several of these, each with a weight or without: ``"a.jsonl:0.7"``. Or
            rows in memory (mappings), or pairs that are already open.
        samples: Number of pairs to draw, evenly over kinds of question; None means all (256 of the
            demo pairs).
        seed: Determines the drawn pairs.
        split: The split, if ``data`` does not name it.
        strict: Whether a row that cannot be used is an error.
        videos: Whether rows about videos can be used, because the model takes videos.

    Returns:
        Pairs that can be iterated several times with the same result.

    Raises:
        DataError: No such source, no usable pair, or a bad one under ``strict``.
    """
    how = Draw(samples, seed, strict, videos)
    if isinstance(data, Pairs):
        return data
    if data is None or isinstance(data, str | Path):
        named = [] if data is None else [str(data)]
    else:
        given: list[Any] = list(data)
        if not given or not all(isinstance(each, str | Path) for each in given):
            return open_memory(cast("Sequence[Mapping[str, Any]]", given), how)
        named = [str(each) for each in given]
    parts = parts_of(named)
    if len(parts) <= 1:
        return _open(parts[0].data if parts else None, how, split)
    return mixed(parts, how, partial(_open_part, split=split))


def _open_part(part: Part, how: Draw, split: str | None) -> Pairs:
    return _open(part.data, how, split)


def _open(data: str | None, how: Draw, split: str | None) -> Pairs:
    """Open one source."""
    if data is None or data.startswith("demo:"):
        return _open_demo((data or "").partition(":")[2] or split, how)
    path, named = _path_and_split(data)
    split = named or split
    if path.is_dir() and data:
        from yopo.data.tables import open_directory

        return open_directory(path, how, split)
    if path.suffix.lower() in _SUFFIXES or path.exists():
        return _open_file(path, how, split)
    looks_local = path.is_absolute() or data.startswith((".", "~"))
    if _HUB_ID.fullmatch(data) and not looks_local:
        return _open_hub(data, how, split)
    raise DataError(f"{data}: no such file or directory.", remedy=_FORMS)


def check_exists(data: Iterable[str]) -> None:
    """Refuse names of sources that can be no pairs, without reading anything.

    Raises:
        DataError: No such file, directory or demo set.
    """
    for part in parts_of(list(data)):
        name = part.data
        if name.startswith("demo:"):
            _check_demo(name.partition(":")[2] or SETS[0])
            continue
        path, _ = _path_and_split(name)
        looks_local = path.is_absolute() or name.startswith((".", "~"))
        is_hub_id = bool(_HUB_ID.fullmatch(name)) and not looks_local
        if path.suffix.lower() in _SUFFIXES and not path.exists():
            raise DataError(f"{path}: no such file.", remedy=_FORMS)
        if not path.exists() and not is_hub_id:
            raise DataError(f"{name}: no such file or directory.", remedy=_FORMS)


def _path_and_split(data: str) -> tuple[Path, str | None]:
    """Parse ``DIR:split`` if the part before the colon is a directory."""
    path = Path(data).expanduser()
    head, _, tail = data.rpartition(":")
    if not path.exists() and head and Path(head).expanduser().is_dir():
        return Path(head).expanduser(), tail
    return path, None


def _open_hub(data: str, how: Draw, split: str | None) -> Pairs:
    from yopo.data.tables import open_hub

    repository, *rest = data.split(":")
    config = rest[0] if len(rest) == 2 else None
    return open_hub(repository, config, rest[-1] if rest else split, how)


def _check_demo(name: str) -> None:
    if name not in SETS:
        raise DataError(f"The demo pairs have no split '{name}'.", remedy=suggest(name, SETS))


def _open_demo(name: str | None, how: Draw) -> Pairs:
    name = name or "calibration"
    _check_demo(name)
    count = how.samples or DEFAULT_SAMPLES
    read = partial(_read_demo, name, count, how.seed)
    return Pairs(name=f"demo:{name}", total=count, digest=None, read=read)


def _read_demo(name: str, count: int, seed: int) -> Iterator[Pair]:
    from yopo.demo.pair_files import pairs_of

    for index, pair in enumerate(pairs_of(name, count, seed=seed)):
        where = f"demo:{name} pair {index}"
        image = ImageRef(pair.image, f"{where}: image {pair.id}")
        yield Pair((image,), pair.question, (pair.answer,), pair.kind, pair.id, where)


def _open_file(path: Path, how: Draw, split: str | None) -> Pairs:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path}: no such file.", remedy=_FORMS)
    if suffix not in _SUFFIXES:
        raise DataError(f"{path}: pairs cannot be read from this kind of file.", remedy=_FORMS)
    if split is not None:
        raise DataError(f"{path}: a single file has no splits, so there is no '{split}'.")
    if suffix == ".parquet":
        from yopo.data.tables import open_parquet

        return open_parquet(path, how)
    return open_csv(path, how) if suffix in (".csv", ".tsv") else _open_json(path, how)


def _open_json(path: Path, how: Draw) -> Pairs:
    """Check every row of a JSON or JSONL file, and the images of the drawn ones."""
    rows, folder = JsonRows(path), path.parent.resolve()
    left_out = LeftOut(str(path), strict=how.strict)
    usable, kinds, names = array("Q"), array("L"), dict[str | None, int]()
    for number, (_, row) in enumerate(rows.scan()):
        try:
            pair = pair_from_row(row, where=rows.where(number), number=number, folder=folder)
        except BadPair as error:
            left_out.add(error)
            continue
        usable.append(number)
        kinds.append(names.setdefault(pair.kind, len(names)))
    read = partial(_read_json, rows, folder)
    kept = draw(how, str(path), usable, kinds, read, left_out, is_scanned=True)
    name = printable(path.name)
    return Pairs(name, len(kept), rows.digest, read=lambda: (pair for _, pair in read(kept)))


def _read_json(rows: JsonRows, folder: Path, numbers: Sequence[int]) -> Iterator[tuple[int, Pair]]:
    for number, _, row in rows.read(numbers):
        where = rows.where(number)
        yield number, pair_from_row(row, where=where, number=number, folder=folder)
