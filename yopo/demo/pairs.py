"""Demo pairs as files: images, and one JSON line per question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from yopo.demo.scenes import pairs

PAIRS_NAME = "pairs.jsonl"
IMAGES_NAME = "images"


def write_pairs(
    directory: Path | str,
    split: str,
    count: int,
    *,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
) -> Path:
    """Write `images/*.png` and `pairs.jsonl`; the same arguments give the same bytes.

    Each line is {"image": path relative to the directory, "question", "answer", "kind", "id"}.

    Args:
        directory: where to write; made where it is missing.
        split: "train", "calibration" or "heldout".
        count: how many pairs.
        seed: another seed, other pairs.
        kinds: see `yopo.demo.scenes.pairs`.

    Returns:
        The path of `pairs.jsonl`. It is written last, so where it exists all images do.
    """
    directory = Path(directory)
    found = list(pairs(split, count, seed=seed, kinds=kinds))
    (directory / IMAGES_NAME).mkdir(parents=True, exist_ok=True)
    lines = []
    for pair in found:
        name = f"{IMAGES_NAME}/{pair.id}.png"
        pair.image.save(directory / name)
        line = {
            "image": name,
            "question": pair.question,
            "answer": pair.answer,
            "kind": pair.kind,
            "id": pair.id,
        }
        lines.append(json.dumps(line) + "\n")
    path = directory / PAIRS_NAME
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path
