"""Pairs read by the ``datasets`` library: parquet, image folders, saved datasets, the hub.

Images are not decoded until a batch needs them, and rows keep their numbers for messages.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yopo.data.drawing import Decoder, Draw, draw, warn_all_used
from yopo.data.left_out import BadPair, LeftOut
from yopo.data.listed import images_in, open_images
from yopo.data.pairs import Pair, Pairs
from yopo.data.rows import KIND_NAMES, pair_from_row
from yopo.models.hub import probe
from yopo.support.console import track
from yopo.support.errors import DataError, suggest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SHUFFLE_BUFFER = 1000
"""Maximum rows of a stream that are downloaded to draw a sample from."""

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def open_parquet(path: Path, how: Draw) -> Pairs:
    """Open one parquet file."""
    import datasets

    load = partial(datasets.load_dataset, "parquet", data_files=glob.escape(str(path)))
    found = _guarded(load, f"{path}: cannot be read as parquet")
    return _from_table(found["train"], path.name, str(path), path.parent, how)


def open_directory(path: Path, how: Draw, split: str | None) -> Pairs:
    """Open a ``save_to_disk`` directory, an image folder, or one with parquet files.

    Images without metadata are asked general questions (see ``listed.QUESTIONS``).

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
        return _open_plain_folder(path, how, split)
    found = _guarded(load, f"{path}: cannot be read as a dataset")
    name = path.resolve().name
    if isinstance(found, Mapping):
        split = _the_split(list(found), split, str(path))
        found, name = found[split], f"{name}:{split}" if len(found) > 1 else name
    elif split is not None:
        raise DataError(f"{path}: has no splits, so there is no '{split}'.")
    return _from_table(found, name, str(path), path, how)


def _open_plain_folder(path: Path, how: Draw, split: str | None) -> Pairs:
    images = images_in(path)
    if not images:
        raise DataError(
            f"{path}: the directory holds no pairs.",
            remedy=f"Put images, parquet files or one of {', '.join(_METADATA)} into it, save a "
            "dataset there with save_to_disk, or give a .jsonl file.",
        )
    if split is not None:
        raise DataError(f"{path}: has no splits, so there is no '{split}'.")
    return open_images(path, images, how)


def open_hub(repository: str, config: str | None, split: str | None, how: Draw) -> Pairs:
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
    if how.samples is None:
        whole = _WholeStream(stream, name, strict=how.strict, videos=how.videos)
        return Pairs(name=name, total=None, digest=answer.commit, read=whole.read)
    pairs = _fetch(stream, how.samples, how, name)
    return Pairs(name=name, total=len(pairs), digest=answer.commit, read=partial(iter, pairs))


def _fetch(stream: IterableDataset, samples: int, how: Draw, name: str) -> list[Pair]:
    """Draw a sample from a stream and keep it in memory, images compressed: one download."""
    buffer = min(SHUFFLE_BUFFER, 8 * samples)
    left_out = LeftOut(name, strict=how.strict)
    decoder = Decoder(left_out, videos=how.videos)
    rows = islice(stream.shuffle(seed=how.seed, buffer_size=buffer), buffer + samples)
    found = (pair for _, pair in _read(rows, None, name, None, left_out) if decoder.decodes(pair))
    some = islice(found, samples)
    pairs = list(track(some, label=f"fetching {name}", total=samples, unit="pairs"))
    left_out.refuse_if_nothing_is_left(len(pairs))
    left_out.report(len(pairs) + left_out.count)
    if len(pairs) < samples:
        warn_all_used(name, samples, len(pairs))
    return pairs


class _WholeStream:
    """All pairs of a stream. What cannot be used is found in the first pass, in its order.

    Args:
        stream: The rows.
        name: The stream's name in messages.
        strict: Whether a row that cannot be used is an error.
        videos: Whether rows about videos can be used.
    """

    def __init__(self, stream: IterableDataset, name: str, *, strict: bool, videos: bool):
        self._stream, self._name = stream, name
        self._left_out = LeftOut(name, strict=strict)
        self._decoder = Decoder(self._left_out, videos=videos)
        self._seen, self._bad, self._is_known = 0, set[int](), False

    def read(self) -> Iterator[Pair]:
        """The pairs that can be used; the first complete pass warns of the others."""
        left_out = LeftOut(self._name) if self._seen else self._left_out  # counted already
        kept = 0
        for number, pair in _read(self._stream, None, self._name, None, left_out):
            if number >= self._seen:
                self._seen = number + 1
                if not self._decoder.decodes(pair):
                    self._bad.add(number)
            if number not in self._bad:
                kept += 1
                yield pair
        if not self._is_known:
            self._left_out.refuse_if_nothing_is_left(kept)
            self._left_out.report(kept + self._left_out.count)
            self._is_known = True


def _from_table(table: Dataset, name: str, where: str, folder: Path, how: Draw) -> Pairs:
    """Draw from a table whose length is known."""
    folder, left_out = folder.resolve(), LeftOut(where, strict=how.strict)

    def read(numbers: Sequence[int], left_out: LeftOut) -> Iterator[tuple[int, Pair]]:
        stream = _undecoded(table.select(numbers).to_iterable_dataset())
        return _read(stream, numbers, where, folder, left_out)

    rows = range(len(table))
    reading = partial(read, left_out=left_out)
    kept = draw(how, where, rows, _kinds(table), reading, left_out, is_scanned=False)
    fixed = LeftOut(where, strict=True)  # whatever goes wrong from now on is an error
    return Pairs(
        name=name,
        total=len(kept),
        digest=None,
        read=lambda: (pair for _, pair in read(kept, fixed)),
    )


def _kinds(table: Dataset) -> Sequence[str | None]:
    """The kind that each row of a table states; None where it states none."""
    by_name = {name.lower(): name for name in table.column_names}
    column = next((by_name[name] for name in KIND_NAMES if name in by_name), None)
    if column is None:
        return [None] * len(table)
    return [each if isinstance(each, str) else None for each in table[column]]


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
    stream: Iterable[Any],
    numbers: Sequence[int] | None,
    where: str,
    folder: Path | None,
    left_out: LeftOut,
) -> Iterator[tuple[int, Pair]]:
    """Read rows as (number, pair).

    Args:
        stream: The rows.
        numbers: The rows' numbers from 0; None counts them.
        where: The source's name.
        folder: Base of relative image paths, if there is one.
        left_out: Counts those that are no pairs.
    """
    rows = iter(stream)
    for number in count() if numbers is None else numbers:
        try:
            row = next(rows, None)
        except Exception as error:  # network, decompression or cast errors of any library
            raise DataError(f"{where}: reading failed at row {number}: {_brief(error)}.") from error
        if row is None:
            break
        try:
            pair = pair_from_row(row, where=f"{where} row {number}", number=number, folder=folder)
        except BadPair as error:
            left_out.add(error)
            continue
        yield number, pair


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
