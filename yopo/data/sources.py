"""Opens image-question pairs by name: demo, file, directory or hub dataset."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from yopo.data.json_rows import JsonRows
from yopo.data.pairs import Data, ImageRef, Pair, Pairs
from yopo.data.rows import pair_from_row
from yopo.data.sampling import check_samples, chosen
from yopo.demo import SETS
from yopo.support.errors import DataError, printable, suggest

DEFAULT_DEMO_PAIRS = 256
_SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[^:/]+){0,2}")
_FORMS = (
    "Give a .jsonl, .json or .parquet file, a directory (parquet, image folder with metadata, "
    "save_to_disk), a hub id org/name[:split], or demo:calibration."
)


def open_pairs(
    data: Data | None, *, samples: int | None, seed: int, split: str | None = None
) -> Pairs:
    """Open image-question pairs, with all checks that are cheap.

    For a JSON file every row is checked, and that the images of the sampled pairs exist; for a
    table or stream only the first row, the others when they are read. Images are decoded when used.

    Args:
        data: ``None`` (demo pairs about scenes), ``demo:SET`` (one of ``yopo.demo.SETS``), a
            ``.jsonl``, ``.json`` or ``.parquet`` file, a directory, or a hub id
            ``org/name[:split]`` or ``org/name:config:split``. A directory may carry its split as
            ``DIR:split``. Or rows in memory (mappings), or pairs that are already open.
        samples: Number of pairs to draw; None means all (256 of the demo pairs).
        seed: Determines the drawn pairs.
        split: The split, if ``data`` does not name it.

    Returns:
        Pairs that can be iterated several times with the same result.

    Raises:
        DataError: No such source, or a bad pair (the first one): nothing is skipped silently.
    """
    check_samples(samples)
    if isinstance(data, Pairs):
        return data
    if not isinstance(data, str | Path | None):
        return _open_rows(data, samples, seed)
    data = None if data is None else str(data)
    if data is None or data.startswith("demo:"):
        return _open_demo((data or "").partition(":")[2] or split, samples, seed)
    path, named = _path_and_split(data)
    split = named or split
    if path.is_dir() and data:
        from yopo.data.tables import open_directory

        return open_directory(path, samples=samples, seed=seed, split=split)
    if path.suffix.lower() in _SUFFIXES or path.exists():
        return _open_file(path, samples, seed, split)
    looks_local = path.is_absolute() or data.startswith((".", "~"))
    if _HUB_ID.fullmatch(data) and not looks_local:
        return _open_hub(data, samples, seed, split)
    raise DataError(f"{data}: no such file or directory.", remedy=_FORMS)


def _open_rows(rows: Sequence[Mapping[str, Any]], samples: int | None, seed: int) -> Pairs:
    """Open rows in memory; image paths are relative to the working directory."""
    rows, folder = list(rows), Path.cwd()
    if not rows:
        raise DataError("There are no rows in memory.")
    pairs = [
        pair_from_row(row, where=f"row {number}", number=number, folder=folder)
        for number, row in enumerate(rows)
    ]
    kept = chosen(len(pairs), samples, seed, where="rows in memory")
    found = [pairs[number] for number in kept]
    for pair in found:
        for image in pair.images:
            image.check()
    return Pairs("rows in memory", total=len(found), digest=None, read=lambda: iter(found))


def _path_and_split(data: str) -> tuple[Path, str | None]:
    """Parse ``DIR:split`` if the part before the colon is a directory."""
    path = Path(data).expanduser()
    head, _, tail = data.rpartition(":")
    if not path.exists() and head and Path(head).expanduser().is_dir():
        return Path(head).expanduser(), tail
    return path, None


def _open_hub(data: str, samples: int | None, seed: int, split: str | None) -> Pairs:
    from yopo.data.tables import open_hub

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
    from yopo.demo.pair_files import pairs_of

    for index, pair in enumerate(pairs_of(name, count, seed=seed)):
        where = f"demo:{name} pair {index}"
        image = ImageRef(pair.image, f"{where}: image {pair.id}")
        yield Pair((image,), pair.question, (pair.answer,), pair.kind, pair.id, where)


def _open_file(path: Path, samples: int | None, seed: int, split: str | None) -> Pairs:
    if not path.exists():
        raise DataError(f"{path}: no such file.", remedy=_FORMS)
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{path}: pairs cannot be read from this kind of file.", remedy=_FORMS)
    if split is not None:
        raise DataError(f"{path}: a single file has no splits, so there is no '{split}'.")
    if path.suffix.lower() == ".parquet":
        from yopo.data.tables import open_parquet

        return open_parquet(path, samples=samples, seed=seed)
    return _open_json(path, samples, seed)


def _open_json(path: Path, samples: int | None, seed: int) -> Pairs:
    """Check every row of a JSON or JSONL file, and that the images of the sampled ones exist."""
    rows = JsonRows(path)
    folder = path.parent.resolve()
    for number, (line, row) in enumerate(rows.scan()):
        pair_from_row(row, where=f"{path}:{line}", number=number, folder=folder)
    if not rows:
        raise DataError(f"{path}: holds no pairs.")
    kept = chosen(len(rows), samples, seed, where=str(path))
    read = partial(_read_json, rows, kept, folder)
    for pair in read():
        for image in pair.images:
            image.check()
    return Pairs(name=printable(path.name), total=len(kept), digest=rows.digest, read=read)


def _read_json(rows: JsonRows, numbers: list[int], folder: Path) -> Iterator[Pair]:
    for number, line, row in rows.read(numbers):
        yield pair_from_row(row, where=f"{rows.path}:{line}", number=number, folder=folder)
