"""Pairs on disk: same arguments, same bytes; what is read back is what was generated."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from yopo.demo.pairs import write_pairs
from yopo.demo.scenes import KINDS, pairs


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    write_pairs(tmp_path / "one", "calibration", 14, seed=3, kinds=KINDS)
    write_pairs(tmp_path / "other", "calibration", 14, seed=3, kinds=KINDS)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert len(contents(tmp_path / "one")) == 15


def test_files_hold_the_generated_pairs(tmp_path: Path) -> None:
    path = write_pairs(str(tmp_path), "heldout", 12)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line, pair in zip(lines, pairs("heldout", 12), strict=True):
        assert set(line) == {"image", "question", "answer", "kind", "id"}
        assert (line["question"], line["answer"]) == (pair.question, pair.answer)
        assert (line["kind"], line["id"]) == (pair.kind, pair.id)
        assert Image.open(tmp_path / line["image"]).tobytes() == pair.image.tobytes()
