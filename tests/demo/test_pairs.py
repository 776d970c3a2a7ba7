"""Pairs on disk have the same bytes for the same arguments, and read back as generated."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from yopo.data.sources import open_pairs
from yopo.demo import SETS, demo_data
from yopo.demo.pair_files import pairs_of, write_pairs
from yopo.demo.scenes import KINDS, pairs
from yopo.demo.task import find_pair


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    write_pairs(tmp_path / "one", "calibration", 14, seed=3, kinds=KINDS)
    find_pair.cache_clear()
    write_pairs(tmp_path / "other", "calibration", 14, seed=3, kinds=KINDS)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert len(contents(tmp_path / "one")) == 15


@pytest.mark.parametrize("name", SETS)
def test_every_set_can_be_written_and_opened(name: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path, name, 6, seed=1)
    written = list(open_pairs(str(path), samples=None, seed=0))
    find_pair.cache_clear()
    opened = open_pairs(f"demo:{name}", samples=6, seed=1)
    assert (opened.name, opened.total) == (f"demo:{name}", 6)
    for one, other in zip(written, opened, strict=True):
        assert (one.question, one.answers, one.kind) == (other.question, other.answers, other.kind)
        assert one.answers and one.kind
        assert one.images[0].load().tobytes() == other.images[0].load().tobytes()


def test_sets_hold_different_pairs() -> None:
    images = {name: {p.image.tobytes() for p in pairs_of(name, 12)} for name in SETS}
    for one, other in itertools.combinations(SETS, 2):
        assert not images[one] & images[other]
    with pytest.raises(ValueError, match="must be one of"):
        pairs_of("glyphs", 1)


def test_models_are_shown_their_own_task() -> None:
    assert demo_data("llava-tiny", "calibration") == "demo:calibration"
    assert demo_data("llava-1.5-7b", "heldout") == "demo:heldout"
    assert demo_data("qwen2-vl-tiny", "heldout") == "demo:glyphs-heldout"
    assert demo_data("internvl-tiny", "calibration") == "demo:tickets-calibration"


def test_files_hold_the_generated_pairs(tmp_path: Path) -> None:
    path = write_pairs(str(tmp_path), "heldout", 12)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    find_pair.cache_clear()
    for line, pair in zip(lines, pairs("heldout", 12), strict=True):
        assert set(line) == {"image", "question", "answer", "kind", "id"}
        assert (line["question"], line["answer"]) == (pair.question, pair.answer)
        assert (line["kind"], line["id"]) == (pair.kind, pair.id)
        assert Image.open(tmp_path / line["image"]).tobytes() == pair.image.tobytes()
