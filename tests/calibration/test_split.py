"""Plans are never compared on pairs or images that they were fitted on; splits are repeatable."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

from yopo.data.pairs import ImageRef, Pair
from yopo.data.split import (
    FEW,
    MIN_SIDE,
    group_by_image,
    image_digest,
    pick,
    split_pairs,
    warn_if_few,
)
from yopo.support.errors import DataError


def pair(*images: object, question: str = "what?") -> Pair:
    refs = tuple(ImageRef(image, "p:1: image") for image in images)
    return Pair(refs, question, (), None, "0", "p:1")


def different(count: int) -> list[Pair]:
    """Make pairs about one image each."""
    return [pair(f"image {number}".encode()) for number in range(count)]


SIZES = {1: (1, 0), 8: (8, 0), 15: (15, 0), 16: (8, 8), 32: (24, 8), 256: (192, 64)}
WITH_HOLDOUT = {16: (16, 0, 0), 24: (8, 8, 8), 256: (128, 64, 64), 2048: (1728, 64, 256)}


@pytest.mark.parametrize("holdout", [False, True])
def test_the_sides_are_disjoint_and_sane(holdout: bool) -> None:
    for total, sizes in (WITH_HOLDOUT if holdout else SIZES).items():
        wanted = {"fit": 256, "comparison": 64, "holdout": 256 if holdout else 0}
        found = split_pairs(different(total), seed=0, **wanted)
        sides = (found.statistics, found.comparison, found.holdout)
        assert tuple(map(len, sides)) == (*sizes, 0)[:3]
        assert found.fit <= found.statistics and len(found.fit) == min(256, sizes[0])
        assert sum(map(len, sides)) == total and frozenset().union(*sides) == set(range(total))
        assert not found.comparison or min(len(found.fit), len(found.comparison)) >= MIN_SIDE


def test_all_pairs_are_measured_if_nothing_is_compared() -> None:
    found = split_pairs(different(9), seed=0, fit=4)
    assert found.statistics == set(range(9)) and len(found.fit) == 4
    assert not found.comparison and not found.holdout


def test_a_seed_always_splits_the_same_way() -> None:
    first, again, other = (
        split_pairs(different(64), seed=seed, fit=256, comparison=16) for seed in (1, 1, 2)
    )
    assert first == again != other
    # Not the first ones: data is often sorted.
    assert first.comparison != set(range(16))


def test_pairs_that_share_an_image_stay_together() -> None:
    rng = random.Random(0)
    pairs = [pair(f"{rng.randrange(30)}".encode(), question=str(n)) for n in range(200)]
    found = split_pairs(pairs, seed=3, fit=256, comparison=64, holdout=256)
    shown = [
        {image.source for number in side for image in pairs[number].images}
        for side in (found.statistics, found.comparison, found.holdout)
    ]
    assert all(shown) and not any(shown[a] & shown[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert found.images == 30 and found.total == 200


def test_images_join_pairs_through_others() -> None:
    pairs = [pair(b"a"), pair(b"b"), pair(b"c"), pair(b"d", b"b"), pair(b"a", b"d"), pair(b"e")]
    assert group_by_image(pairs) == [[0, 1, 3, 4], [2], [5]]


def test_two_images_are_split_between_fitting_and_comparing() -> None:
    pairs = [pair(b"one", question=str(n)) for n in range(20)]
    pairs += [pair(b"two", question=str(n)) for n in range(12)]
    found = split_pairs(pairs, seed=0, fit=256, comparison=64)
    assert found.statistics == set(range(20)) and len(found.comparison) == 8
    alone = split_pairs(pairs[:20], seed=0, fit=256, comparison=64)
    assert not alone.comparison and len(alone.statistics) == 20 and alone.images == 1


def test_the_same_bytes_are_the_same_image(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 3), "red")
    for name in ("a.png", "copy.png"):
        picture.save(tmp_path / name)
    Image.new("RGB", (4, 3), "blue").save(tmp_path / "b.png")
    a, copy, b = (
        image_digest(ImageRef(tmp_path / name, name)) for name in ("a.png", "copy.png", "b.png")
    )
    assert a == copy == image_digest(ImageRef((tmp_path / "a.png").read_bytes(), "a")) != b
    in_memory = [Image.new("RGB", size, "red") for size in ((4, 3), (4, 3), (3, 4))]
    red, again, upright = (image_digest(ImageRef(image, "i")) for image in in_memory)
    assert red == again != upright
    assert image_digest(ImageRef("hf://x/1.png", "r")) != image_digest(ImageRef("hf://x/2.png", ""))
    with pytest.raises(DataError, match="there is no file"):
        image_digest(ImageRef(tmp_path / "none.png", "p:1: image none.png"))


def test_picking_keeps_the_order_and_stops_at_the_last() -> None:
    def endless():
        yield from different(5)
        raise AssertionError("read too far")

    wanted = [each.images[0].source for each in pick(endless(), frozenset({4, 1}))]
    assert wanted == [b"image 1", b"image 4"]
    assert list(pick(endless(), frozenset())) == []


def test_too_few_pairs_or_images_cause_a_warning(capsys: pytest.CaptureFixture) -> None:
    for pairs, expected in (
        (different(1), "warning: Only 1 pair to"),
        (different(FEW - 1), f"warning: Only {FEW - 1} pairs to"),
        ([pair(b"one")] * 40, "warning: Only 40 pairs of 1 different image to"),
        (different(FEW), ""),
    ):
        warn_if_few(split_pairs(pairs, seed=0, fit=256, comparison=64))
        said = capsys.readouterr().err
        assert said.startswith(expected) and bool(said) == bool(expected)
        assert not said or f"at least {FEW}" in said and "--samples" in said
