"""Patches that are merged into one token lie where the families say: row by row."""

from __future__ import annotations

import pytest
import torch
import zoo
import zoo_idefics3
import zoo_mistral3

from yopo.models.idefics3 import IDEFICS3, SMOLVLM
from yopo.models.mistral3 import MISTRAL3
from yopo.plans.grid import Grid
from yopo.support.errors import ModelError


@pytest.mark.parametrize("entry", zoo_idefics3.ENTRIES, ids=lambda entry: entry.name)
def test_a_crops_tokens_are_squares_of_patches(entry: zoo_idefics3.Idefics3) -> None:
    model, side, scale = zoo.build(entry).model, zoo_idefics3.SIDE, zoo_idefics3.SCALE
    connector = model.model.connector
    patches = torch.arange(side * scale * side * scale).reshape(1, -1, 1).float()
    merged = connector.pixel_shuffle(patches, scale)[0]  # (tokens, patches of each)
    assert merged.shape == (side * side, scale * scale)
    rows, cols = merged // (side * scale) // scale, merged % (side * scale) // scale
    place = torch.arange(side * side)[:, None].expand_as(rows)
    assert torch.equal(rows, (place // side).float()) and torch.equal(cols, (place % side).float())


def test_mistral3s_tokens_are_squares_of_patches() -> None:
    entry = zoo_mistral3.ENTRIES[0]
    model = zoo.build(entry).model.model
    merger, (high, wide) = model.multi_modal_projector.patch_merger, (3 * 2, 5 * 2)
    width = model.config.vision_config.hidden_size
    patches = torch.zeros(high, wide, width)
    patches[2:4, 6:8] = 1.0  # of row 1, column 3
    sizes = torch.tensor([[high * zoo_mistral3.PATCH, wide * zoo_mistral3.PATCH]])
    with torch.no_grad():
        merged = merger(patches.reshape(-1, width), sizes)
    assert merged.abs().sum(dim=1).nonzero().flatten().tolist() == [1 * 5 + 3]


def test_what_does_not_fit_is_refused() -> None:
    config = zoo_mistral3.ENTRIES[0].build().config
    with pytest.raises(ModelError, match="needs the sizes of its images"):
        MISTRAL3.grids_of(config, [[(7, 15)]], {})
    with pytest.raises(ModelError, match="do not match the images"):
        MISTRAL3.grids_of(config, [[(7, 15)]], {"image_sizes": torch.tensor([[8, 8]])})
    for family, entry in zip((IDEFICS3, SMOLVLM), zoo_idefics3.ENTRIES, strict=True):
        crops = family.grids_of(entry.build().config, [[(7, 16), (7, 16)], [(7, 32)]], {})
        assert crops == [(Grid(4, 4),) * 2] * 2
        with pytest.raises(ModelError, match="17 visual tokens are not a whole number of images"):
            family.grids_of(entry.build().config, [[(7, 17)]], {})
