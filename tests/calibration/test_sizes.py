"""Sizes of images: known without decoding, varied by resizing, shared out among the sides."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from yopo.data import sizes
from yopo.data.pairs import ImageRef, Pair, Pairs
from yopo.data.sizes import by_size, in_sizes, resized, scaled, size_class
from yopo.data.split import split_pairs
from yopo.support.errors import DataError


def pair(source: object) -> Pair:
    return Pair((ImageRef(source, "here"),), "what?", (), None, "0", "p:1")


def png(width: int, height: int, shade: int = 0) -> bytes:
    file = BytesIO()
    Image.new("L", (width, height), shade).save(file, "PNG")
    return file.getvalue()


def test_pairs_take_scales_in_turn() -> None:
    pairs = [pair(png(40, 20, shade)) for shade in range(5)]
    found = [each.images[0].load().size for each in resized(pairs, (1, 0.5, 2))]
    assert found == [(40, 20), (20, 10), (80, 40), (40, 20), (20, 10)]
    source = Pairs("mine", 5, None, lambda: iter(pairs))
    assert in_sizes(source, (1.0,)) is source
    twice = in_sizes(source, (2.0,))
    assert [len(list(twice)) for _ in range(2)] == [5, 5] and twice.name == "mine"


@pytest.mark.parametrize("scales", [(), (0.0,), (1, -1), (1, 100), (float("nan"),)])
def test_scales_that_make_no_image_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="scales of images must lie between"):
        in_sizes(Pairs("mine", 0, None, lambda: iter(())), scales)


def test_an_image_that_would_be_too_large_is_refused() -> None:
    with pytest.raises(DataError, match="resized, it would have 32000 x 8000 pixels"):
        scaled(pair(Image.new("1", (4000, 1000))), 8).images[0].load()


def test_classes_are_octaves_of_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(32, 16))
    for source in (path, png(32, 16), Image.new("L", (32, 16))):
        assert size_class(pair(source)) == 9
        assert size_class(scaled(pair(source), 2)) == 11
    for unknown in ("hf://somewhere", tmp_path / "none.png", b"no image", tmp_path):
        assert size_class(pair(unknown)) is None


def test_images_of_one_size_come_together_and_otherwise_in_order() -> None:
    sides = (32, 16, 32, 64, 16)
    pairs = [replace(pair(png(side, 16)), id=str(number)) for number, side in enumerate(sides)]
    pairs += [replace(pair("hf://somewhere"), id="remote"), scaled(replace(pairs[0], id="half"), 2)]
    found = [each.id for each in by_size(iter(pairs))]
    assert found == ["remote", "1", "4", "0", "2", "3", "half"]  # 64 x 16 before 64 x 32


def test_batches_of_pairs_hold_one_grid_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "WINDOW", 4)  # what is held in memory is bounded
    pairs = [pair(png(16 + 16 * (number % 2), 16)) for number in range(8)]
    widths = [each.images[0].load().width for each in by_size(pairs)]
    assert widths == [16, 16, 32, 32, 16, 16, 32, 32]


def test_every_side_of_a_split_has_its_share_of_each_size() -> None:
    pairs = [pair(png(16 if number % 4 else 64, 16, number)) for number in range(128)]
    found = split_pairs(pairs, seed=3, fit=32, comparison=32, holdout=32)
    sides = (found.holdout, found.comparison, found.fit, found.statistics)
    shares = [sum(number % 4 == 0 for number in side) / len(side) for side in sides]
    assert shares == [0.25] * 4


def test_an_image_in_two_sizes_stays_on_one_side() -> None:
    twice = [pair(png(16, 16, number // 2)) for number in range(64)]
    found = split_pairs(resized(twice, (1, 2)), seed=0, fit=32, comparison=16)
    assert found.images == 32 and len(found.comparison) == 16
    assert all((number ^ 1 in found.comparison) for number in found.comparison)
