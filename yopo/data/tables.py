"""Pairs read by the ``datasets`` library: parquet, image folders, saved datasets, the hub.

Images are not decoded until a batch needs them, and rows keep their numbers for messages.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yopo.data.pairs import Pair, Pairs
from yopo.data.rows import pair_from_row
from yopo.data.sampling import chosen, warn_all_used
from yopo.models.hub import probe
from yopo.support.console import track
from yopo.support.errors import DataError, suggest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SHUFFLE_BUFFER = 1000
"""Maximum rows of a stream that are downloaded to draw a sample from."""

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def open_parquet(path: Path, *, samples: int | None, seed: int) -> Pairs:
    """Open one parquet file."""
    import datasets

    load = partial(datasets.load_dataset, "parquet", data_files=glob.escape(str(path)))
    found = _guarded(load, f"{path}: cannot be read as parquet")
    return _from_table(found["train"], path.name, str(path), path.parent, samples, seed)


def open_directory(path: Path, *, samples: int | None, seed: int, split: str | None) -> Pairs:
    """Open a ``save_to_disk`` directory, an image folder with metadata, or one with parquet files.

    Raises:
        DataError: It is none of these, cannot be read, or has several splits and none was named.
    """
    import datasets

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        load = partial(datasets.load_from_disk, str(path))
    elif any(_holds(path, name, depth=2) for name in _METADATA):
        load = partial(datasets.load_dataset, "imagefolder", data_dir=str(path))
    elif _holds(path, "*.parquet", depth=3):
        load = partial(datasets.load_dataset, "parquet", data_dir=str(path))
    else:
        raise DataError(
            f"{path}: the directory holds no pairs.",
            remedy=f"Put parquet files or one of {', '.join(_METADATA)} into it, save a dataset "
            "there with save_to_disk, or give a .jsonl file.",
        )
    found = _guarded(load, f"{path}: cannot be read as a dataset")
    name = path.resolve().name
    if isinstance(found, Mapping):
        split = _the_split(list(found), split, str(path))
        found, name = found[split], f"{name}:{split}" if len(found) > 1 else name
    elif split is not None:
        raise DataError(f"{path}: has no splits, so there is no '{split}'.")
    return _from_table(found, name, str(path), path, samples, seed)


def open_hub(
    repository: str, config: str | None, split: str | None, *, samples: int | None, seed: int
) -> Pairs:
    """Open a hub dataset as a stream, pinned to the current commit of its main branch.

    A sample is drawn from a seeded shuffle buffer, so it is from the start of big datasets.

    Raises:
        DataError: The hub is unreachable, or has no such dataset, configuration or split.
    """
    import datasets

    answer = probe(repository, kind="dataset")
    if answer.problem is not None:
        raise DataError(
            f"{repository}: not found locally, and cannot be opened on the hub: {answer.problem}.",
            remedy="Check the name and log in with 'hf auth login'."
            if answer.reachable
            else "Give a local file or directory (save_to_disk makes one on a machine with a "
            "network), or omit the data to use the demo pairs.",
        )
    load = partial(
        datasets.load_dataset, repository, config, revision=answer.commit, streaming=True
    )
    found = _guarded(load, f"{repository}: the hub dataset cannot be opened")
    split = _the_split(list(found), split, repository)
    stream = _undecoded(found[split])
    name = ":".join(part for part in (repository, config, split) if part)
    if samples is None:
        read = partial(_read, stream, None, name, None)
        return Pairs(name=name, total=None, digest=answer.commit, read=read)
    pairs = _fetch(stream, samples, seed, name)
    return Pairs(name=name, total=len(pairs), digest=answer.commit, read=partial(iter, pairs))


def _fetch(stream: IterableDataset, samples: int, seed: int, name: str) -> list[Pair]:
    """Draw a sample from a stream and keep it in memory, images compressed: one download."""
    buffer = min(SHUFFLE_BUFFER, 8 * samples)
    drawn = stream.shuffle(seed=seed, buffer_size=buffer).take(samples)
    reading = _read(drawn, None, name, None)
    pairs = list(track(reading, label=f"fetching {name}", total=samples, unit="pairs"))
    if len(pairs) < samples:
        warn_all_used(name, samples, len(pairs))
    return pairs


def _from_table(
    table: Dataset, name: str, where: str, folder: Path, samples: int | None, seed: int
) -> Pairs:
    """Sample a table whose length is known."""
    numbers = chosen(len(table), samples, seed, where=where)
    stream = _undecoded(table.select(numbers).to_iterable_dataset())
    read = partial(_read, stream, numbers, where, folder.resolve())
    next(read())  # raise for missing rows or wrong columns now, not after loading the model
    return Pairs(name=name, total=len(numbers), digest=None, read=read)


def _undecoded(stream: IterableDataset) -> IterableDataset:
    """Make a stream yield images as ``{"bytes", "path"}``; other columns are unchanged.

    ``decode(False)`` alone would also leave columns of chat messages as JSON text.
    """
    import datasets

    if not stream.features:  # unknown until read: nothing is decoded then
        return stream
    described = _images_as_bytes(stream.features.to_dict())
    return stream.decode(False).cast(datasets.Features.from_dict(described))


def _images_as_bytes(node: Any) -> Any:
    """Return a feature description in which no image is decoded."""
    if isinstance(node, list):
        return [_images_as_bytes(each) for each in node]
    if not isinstance(node, dict):
        return node
    changed = {key: _images_as_bytes(value) for key, value in node.items()}
    return {**changed, "decode": False} if node.get("_type") == "Image" else changed


def _read(
    stream: IterableDataset, numbers: list[int] | None, where: str, folder: Path | None
) -> Iterator[Pair]:
    """Read rows as pairs; ``numbers`` are the rows' numbers from 0, None counts them."""
    rows = iter(stream)
    is_empty = True
    for number in count() if numbers is None else numbers:
        try:
            row = next(rows, None)
        except Exception as error:  # network, decompression or cast errors of any library
            raise DataError(f"{where}: reading failed at row {number}: {_brief(error)}.") from error
        if row is None:
            break
        pair = pair_from_row(row, where=f"{where} row {number}", number=number, folder=folder)
        for image in pair.images:
            image.check()
        yield pair
        is_empty = False
    if is_empty:
        raise DataError(f"{where}: holds no pairs.")


def _holds(path: Path, pattern: str, *, depth: int) -> bool:
    """Whether a file is found up to ``depth`` levels deep (no walk over a million images)."""
    return any(any(path.glob("*/" * level + pattern)) for level in range(depth))


def _the_split(splits: list[str], wanted: str | None, where: str) -> str:
    """Return the requested split, or the only one."""
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted is None:
        raise DataError(
            f"{where}: has the splits {', '.join(splits)}, and none was named.",
            remedy=f"Add one to the name: {where}:{splits[0]}.",
        )
    if wanted not in splits:
        raise DataError(f"{where}: has no split '{wanted}'.", remedy=suggest(wanted, splits))
    return wanted


def _guarded(load: Callable[[], Any], problem: str) -> Any:
    """Call into ``datasets`` without its output; any exception becomes one sentence."""
    try:
        with _silenced():
            return load()
    except Exception as error:  # it and its dependencies raise many unrelated types
        raise DataError(f"{problem}: {_brief(error)}.") from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Disable progress bars of ``datasets``, and its logging of errors that it raises anyway."""
    import datasets

    verbosity = datasets.utils.logging.get_verbosity()
    disabled = datasets.utils.are_progress_bars_disabled()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if not disabled:
            datasets.utils.enable_progress_bars()


def _brief(error: BaseException) -> str:
    """Return the first line of the innermost cause: outer ones say "an error occurred"."""
    while error.__cause__ is not None:
        error = error.__cause__
    if "corresponds to no data" in str(error):
        return "it holds no pairs"
    lines = str(error).strip().split("\n")
    return lines[0].rstrip(".") or type(error).__name__
