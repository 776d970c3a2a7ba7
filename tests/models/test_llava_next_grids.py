"""LLaVA-NeXT's grids match how the library packs its features, for any image size."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    image_size_to_num_patches,
)

from yopo.models.llava_next import LLAVA_NEXT, image_grids
from yopo.plans.grid import Grid
from yopo.support.errors import ModelError

BASE, TILES, NEWLINE = 0.0, 1.0, 2.0
CONFIG = LlavaNextConfig()  # 336 pixels by patches of 14, the pinpoints of 1.6


def packed(size: tuple[int, int]) -> torch.Tensor:
    """Return the kinds of tokens in the library's order: (tokens,) of the values above."""
    tiles = image_size_to_num_patches(size, CONFIG.image_grid_pinpoints, 336)
    features = torch.full((tiles, 24 * 24, 1), TILES)
    features[0] = BASE
    (kinds,), _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=CONFIG),
        [features],
        torch.tensor([size]),
        "default",
        torch.tensor([NEWLINE]),
    )
    return kinds[:, 0]


def sizes(count: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    draws = [(rng.randint(1, 2000), rng.randint(1, 2000)) for _ in range(count)]
    extreme = [(1, 2000), (2000, 1), (336, 336), (672, 1008), (1007, 336), (335, 673), (24, 25)]
    return draws + [(height // 9 + 1, width // 9 + 1) for height, width in draws[::4]] + extreme


def test_grids_match_the_librarys_packing() -> None:
    seen = set()
    for size in sizes(300):
        kinds = packed(size)
        base, tiles = image_grids(CONFIG, list(size))
        seen.add(tiles)
        assert len(kinds) == base.tokens + tiles.tokens, size
        assert base == Grid(24, 24) and (kinds[: base.tokens] == BASE).all(), size
        table = kinds[base.tokens :].reshape(tiles.rows, tiles.cols)
        assert (table[:, -1] == NEWLINE).all() and (table[:, :-1] == TILES).all(), size
    assert len(seen) > 50


def test_an_image_without_tiles_is_a_base_and_one_newline() -> None:
    config = LlavaNextConfig(image_grid_pinpoints=[[0, 0]])
    base, rest = image_grids(config, [300, 300])
    one = torch.full((1, 576, 1), BASE)
    (kinds,), _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [one], torch.tensor([[9, 9]]), "default", torch.ones(1)
    )
    assert len(kinds) == base.tokens + rest.tokens == 577 and rest == Grid(1, 1)


def test_images_are_assigned_to_rows_and_beams() -> None:
    first, second = (100, 300), (500, 200)
    grids = {size: image_grids(CONFIG, list(size)) for size in (first, second)}
    tokens = {size: sum(grid.tokens for grid in grids[size]) for size in grids}
    told = {"image_sizes": torch.tensor([first, second, first])}
    rows = [[(7, tokens[first] + tokens[second])], [(7, tokens[first])]]
    expected = [(*grids[first], *grids[second]), grids[first]]
    assert LLAVA_NEXT.grids_of(CONFIG, rows, told) == expected
    beams = [row for row in rows for _ in range(3)]
    assert LLAVA_NEXT.grids_of(CONFIG, beams, told) == [row for row in expected for _ in range(3)]


def test_missing_or_foreign_image_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match="needs the sizes of its images"):
        LLAVA_NEXT.grids_of(CONFIG, [[(7, 1000)]], {})
    with pytest.raises(ModelError, match="do not match the images"):
        LLAVA_NEXT.grids_of(CONFIG, [[(7, 1000)]], {"image_sizes": torch.tensor([[300, 300]])})
