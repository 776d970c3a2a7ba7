"""LLaVA-OneVision's grids match how the library packs its features, alone and in company."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import zoo
import zoo_llava_onevision
from transformers import LlavaOnevisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModel,
    image_size_to_num_patches,
)
from zoo import IMAGE, Picture, Specimen

from yopo.models.layout import LayoutProbe
from yopo.models.llava_onevision import LLAVA_ONEVISION, image_grids
from yopo.plans.grid import Grid
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference
from yopo.support.errors import ModelError

BASE, TILES, NEWLINE = 0.0, 1.0, 2.0
CONFIG = LlavaOnevisionConfig(
    image_grid_pinpoints=[[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
)
"""As published: 384 pixels by patches of 14, which leaves 6 of them over; up to 6 x 6 tiles."""


def packed(size: tuple[int, int], *, alone: bool) -> torch.Tensor:
    """Return the kinds of tokens in the library's order: (tokens,) of the values above."""
    tiles = image_size_to_num_patches(size, CONFIG.image_grid_pinpoints, 384) if alone else 1
    features = torch.full((tiles, 27 * 27, 1), TILES)
    features[0] = BASE
    (kinds,), _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=CONFIG),
        [features],
        torch.tensor([size]),
        torch.tensor([NEWLINE]),
        CONFIG.vision_aspect_ratio,
    )
    return kinds[:, 0]


def test_grids_match_the_librarys_packing() -> None:
    rng = random.Random(0)
    sizes = [(rng.randint(1, 2600), rng.randint(1, 2600)) for _ in range(150)]
    sizes += [(rng.randint(1, 300), rng.randint(1, 2600)) for _ in range(50)]
    sizes += [(384, 384), (1, 2600), (2600, 1), (1152, 1152), (1153, 1152), (2304, 2304)]
    shrunk = 0
    for size in sizes:
        kinds = packed(size, alone=True)
        base, tiles = image_grids(CONFIG, list(size), has_tiles=True)
        assert len(kinds) == base.tokens + tiles.tokens, size
        assert base == Grid(27, 27) and (kinds[: base.tokens] == BASE).all(), size
        table = kinds[base.tokens :].reshape(tiles.rows, tiles.cols)
        assert (table[:, -1] == NEWLINE).all() and (table[:, :-1] != NEWLINE).all(), size
        per_row = 27 * max(size) / 384
        shrunk += max(tiles.rows, tiles.cols - 1) < int(per_row)
    assert shrunk > 20


def test_an_image_in_company_has_the_base_and_a_newline() -> None:
    kinds = packed((700, 900), alone=False)
    base, rest = image_grids(CONFIG, [700, 900], has_tiles=False)
    assert len(kinds) == base.tokens + rest.tokens == 730 and rest == Grid(1, 1)


class InCompany(zoo_llava_onevision.LlavaOnevision):
    """Small letters are the same images, where they share a prompt with others."""

    pictures = zoo_llava_onevision.LlavaOnevision.pictures | {
        letter.lower(): Picture(
            (IMAGE,) * (zoo_llava_onevision.SIDE**2 + 1),
            (Grid(zoo_llava_onevision.SIDE, zoo_llava_onevision.SIDE), Grid(1, 1)),
            zoo_llava_onevision.LlavaOnevision.pictures[letter].size,
        )
        for letter in "ABL"
    }


@pytest.fixture(scope="module")
def company() -> Specimen:
    return zoo.build(InCompany())


ROWS = [[1, 5, "a", 6, "b", 7], [1, "L", 4, 5, 6], [1, "l", "a", "b", 8, 9]]


def inputs_of(specimen: Specimen) -> dict[str, Any]:
    inputs = specimen.inputs(ROWS)
    counts = [sum(isinstance(each, str) for each in row) for row in ROWS]
    return inputs | {"batch_num_images": torch.tensor(counts)}


def test_numbers_of_images_are_seen_in_forward_generate_and_beams(company: Specimen) -> None:
    expected = tuple(company.workload(row).grids for row in ROWS)
    seen: list[Any] = []
    probe = LayoutProbe(company.model.base_model, LLAVA_ONEVISION.grids_of)
    handle = company.model.get_decoder().register_forward_pre_hook(
        lambda *_: seen.append(probe.layout and probe.layout.grids)
    )
    try:
        inputs = inputs_of(company)
        tiny.logits(company.model, inputs)
        company.generate(company.model, inputs, max_new_tokens=1, min_new_tokens=1)
        company.generate(company.model, inputs, max_new_tokens=1, min_new_tokens=1, num_beams=2)
    finally:
        handle.remove()
        probe.remove()
    assert seen == [expected, expected, tuple(each for each in expected for _ in range(2))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beams", [1, 3])
def test_images_in_company_are_pruned_as_specified(
    company: Specimen, seed: int, beams: int
) -> None:
    inputs, plan = inputs_of(company), company.plan(seed)
    if beams > 1:
        tiny.skip_unless_beams_get_their_images(company.oracle, inputs)
    with reference(company.oracle, plan):
        expected = tiny.logits(company.oracle, inputs)
        said = company.generate(company.oracle, inputs, num_beams=beams, use_cache=False)
    with pruned(company.oracle, plan):
        found = tiny.logits(company.oracle, inputs)
        assert torch.equal(company.generate(company.oracle, inputs, num_beams=beams), said)
    where = company.text_positions(inputs)
    assert (found - expected)[where].abs().max() < 1e-9 * expected[where].abs().max()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="needs the sizes of its images"):
        LLAVA_ONEVISION.grids_of(CONFIG, [[(7, 1000)]], {})
    one = {"image_sizes": torch.tensor([[300, 300]])}
    with pytest.raises(ModelError, match="do not match the images"):
        LLAVA_ONEVISION.grids_of(CONFIG, [[(7, 1000)]], one)
    with pytest.raises(ModelError, match="1 images, but batch_num_images tells of 2"):
        LLAVA_ONEVISION.grids_of(
            CONFIG, [[(7, 730)]], one | {"batch_num_images": torch.tensor([2])}
        )
    with pytest.raises(ModelError, match="vision_aspect_ratio 'pad' is not supported"):
        LLAVA_ONEVISION.check_vision(LlavaOnevisionConfig(vision_aspect_ratio="pad"))
    with pytest.raises(ModelError, match="LLaVA-OneVision needs tiles of one size"):
        LLAVA_ONEVISION.check_vision(LlavaOnevisionConfig(vision_config={"model_type": "pixtral"}))
