"""Demo pairs as files: images, and one JSON line per question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from yopo.demo import SETS
from yopo.demo.glyphs import grids
from yopo.demo.scenes import TASK
from yopo.demo.task import DemoPair

PAIRS_NAME = "pairs.jsonl"
IMAGES_NAME = "images"


def pairs_of(
    name: str, count: int, *, seed: int = 0, kinds: Sequence[str] | None = None
) -> Iterator[DemoPair]:
    """Yield pairs of a set.

    Args:
        name: one of `yopo.demo.SETS`.
        count: number of pairs.
        seed: determines the pairs.
        kinds: see `yopo.demo.task.Task.pairs`.

    Raises:
        ValueError: for an unknown set or kind.
    """
    if name not in SETS:
        raise ValueError(f"name must be one of {', '.join(SETS)}; got {name!r}")
    if name == "glyphs-shifted":
        return grids.SHIFTED.pairs("heldout", count, seed=seed, kinds=kinds)
    task = grids.TASK if name.startswith("glyphs-") else TASK
    return task.pairs(name.removeprefix("glyphs-"), count, seed=seed, kinds=kinds)


def write_pairs(
    directory: Path | str,
    name: str,
    count: int,
    *,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
) -> Path:
    """Write `images/*.png` and `pairs.jsonl`; the same arguments give the same bytes.

    Each line is {"image": path relative to the directory, "question", "answer", "kind", "id"}.

    Args:
        directory: where to write; created if it is missing.
        name: one of `yopo.demo.SETS`.
        count: number of pairs.
        seed: determines the pairs.
        kinds: see `yopo.demo.task.Task.pairs`.

    Returns:
        The path of `pairs.jsonl`. It is written last, so if it exists all images do.
    """
    directory = Path(directory)
    found = list(pairs_of(name, count, seed=seed, kinds=kinds))
    (directory / IMAGES_NAME).mkdir(parents=True, exist_ok=True)
    lines = []
    for pair in found:
        file = f"{IMAGES_NAME}/{pair.id}.png"
        pair.image.save(directory / file)
        line = {
            "image": file,
            "question": pair.question,
            "answer": pair.answer,
            "kind": pair.kind,
            "id": pair.id,
        }
        lines.append(json.dumps(line) + "\n")
    path = directory / PAIRS_NAME
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path
