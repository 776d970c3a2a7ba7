"""Blocks of image rows hold every query once, with all keys it may attend to and few others."""

from __future__ import annotations

import pytest

from yopo.plans import grid
from yopo.plans.grid import Grid, row_blocks, shared_blocks, window_pairs

SAMPLES = {
    "3x5": [Grid(3, 5)],
    "1x7": [Grid(1, 7)],
    "5x3": [Grid(5, 3)],
    "7x1": [Grid(7, 1)],
    "1x1": [Grid(1, 1)],
    "24x24": [Grid(24, 24)],
    "9x4 and 3x5": [Grid(9, 4), Grid(3, 5)],
    "5x3, 1x7 and 2x8": [Grid(5, 3), Grid(1, 7), Grid(2, 8)],
}
RADII = (None, 0, 1, 2, 3, 30)


def cells(grids: list[Grid]) -> list[tuple[int, int, int]]:
    """Return (image, row, column) along the visual stream."""
    return [
        (image, row, col)
        for image, each in enumerate(grids)
        for row in range(each.rows)
        for col in range(each.cols)
    ]


def neighbors(grids: list[Grid], query: int, radius: int | None, bidirectional: bool) -> set[int]:
    """Return the keys that a visual query may attend to, following yopo/README.md."""
    places = cells(grids)
    image, row, col = places[query]
    found = set()
    for key, (other, key_row, key_col) in enumerate(places):
        if key > query and not (bidirectional and other == image):
            continue
        if radius is not None and other != image:
            continue
        if radius is None or max(abs(row - key_row), abs(col - key_col)) <= radius:
            found.add(key)
    return found


@pytest.fixture(params=[(3, 64), (3, 1), (1, 1), (2, 9)])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokens = request.param
    monkeypatch.setattr(grid, "ROWS_PER_BLOCK", rows)
    monkeypatch.setattr(grid, "TOKENS_PER_BLOCK", tokens)


@pytest.mark.parametrize("name", SAMPLES)
def test_blocks_cover_every_query_once_in_order(name: str, block_size: None) -> None:
    grids = SAMPLES[name]
    for radius in RADII:
        for bidirectional in (False, True):
            blocks = list(row_blocks(grids, radius, bidirectional))
            covered = [q for block in blocks for q in range(block.start, block.stop)]
            assert covered == list(range(sum(each.tokens for each in grids)))


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "24x24"])
def test_blocks_hold_every_neighbor_of_their_queries(name: str, block_size: None) -> None:
    grids = SAMPLES[name]
    places = cells(grids)
    for radius in RADII:
        for bidirectional in (False, True):
            for block in row_blocks(grids, radius, bidirectional):
                keys = set(range(block.key_start, block.key_stop))
                for query in range(block.start, block.stop):
                    assert places[query][0] == block.image
                    assert neighbors(grids, query, radius, bidirectional) <= keys


@pytest.mark.parametrize("name", SAMPLES)
def test_blocks_hold_no_row_that_no_query_reaches(name: str, block_size: None) -> None:
    grids = SAMPLES[name]
    places = cells(grids)
    for radius in (0, 1, 2):
        for block in row_blocks(grids, radius, False):
            assert {places[key][0] for key in range(block.key_start, block.key_stop)} == {
                block.image
            }
            assert places[block.key_start][1] >= places[block.start][1] - radius
            assert block.key_stop == block.stop
            assert block.pairs == (block.stop - block.start) * (block.key_stop - block.key_start)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("radius", RADII)
def test_window_pairs_count_whole_rows(name: str, radius: int | None) -> None:
    grids = SAMPLES[name]
    places = cells(grids)
    if radius is None:
        assert window_pairs(grids, radius) == len(places) ** 2
        return
    counted = sum(
        image == other and abs(row - key_row) <= radius
        for image, row, _ in places
        for other, key_row, _ in places
    )
    assert window_pairs(grids, radius) == counted


def test_window_pairs_of_the_papers_image_are_counted() -> None:
    assert window_pairs([Grid(24, 24)], 2) == 65_664
    assert window_pairs([Grid(24, 24)], None) == 331_776


@pytest.mark.parametrize("step", [1, 7, 128])
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_shared_blocks_hold_every_samples_neighbors(
    step: int, radius: int | None, bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "TOKENS_PER_SHARED_BLOCK", step)
    samples = [SAMPLES["9x4 and 3x5"], SAMPLES["5x3, 1x7 and 2x8"], [], SAMPLES["1x7"]]
    blocks = list(shared_blocks(samples, radius, bidirectional))
    covered = [query for block in blocks for query in range(block.start, block.stop)]
    assert covered == list(range(max(len(cells(grids)) for grids in samples)))
    for grids in samples:
        for query in range(len(cells(grids))):
            block = next(each for each in blocks if each.start <= query < each.stop)
            keys = range(block.key_start, block.key_stop)
            assert query in keys and neighbors(grids, query, radius, bidirectional) <= set(keys)


def test_shared_blocks_leave_out_distant_rows() -> None:
    samples = [[Grid(40, 20)], [Grid(20, 40)]]
    pairs = sum(block.pairs for block in shared_blocks(samples, 2, False))
    assert pairs < 0.45 * 800**2
