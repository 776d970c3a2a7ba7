"""A reduction before the first layer: tokens kept per image, merged features, positions."""

from __future__ import annotations

import torch

from yopo.baselines.reduction import Reduction
from yopo.models.streams import build_layout
from yopo.plans.grid import Grid

GRIDS = (Grid(1, 3), Grid(2, 2))
IS_VISUAL = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1, 1, 1, 1, 0]]).bool()
LAYOUT = build_layout(IS_VISUAL, [GRIDS, GRIDS])
EMBEDS = torch.arange(40.0).reshape(2, 10, 2)
POSITIONS = torch.arange(10).expand(1, 2, -1)
PER_IMAGE = [torch.tensor([[2], [0]]), torch.tensor([[0, 3], [1, 2]])]


def test_tokens_are_kept_image_by_image() -> None:
    reduction = Reduction.of_images(GRIDS, PER_IMAGE)
    assert reduction.kept.tolist() == [[2, 3, 6], [0, 4, 5]]
    short = reduction.shorten(LAYOUT, EMBEDS, POSITIONS)
    assert short.index.tolist() == [[0, 3, 4, 5, 8, 9], [0, 3, 4, 6, 7, 9]]
    assert short.visual.tolist() == [[1, 3, 4], [0, 3, 4]]
    assert torch.equal(short.embeds, EMBEDS[torch.arange(2)[:, None], short.index])
    assert torch.equal(short.positions[0], short.index)


def test_merged_features_replace_the_kept_tokens() -> None:
    """One matrix per row merges features, including those of later layers."""
    weights = torch.rand(2, 3, 7)
    reduction = Reduction.of_images(GRIDS, PER_IMAGE, merge=lambda each: weights @ each)
    short = reduction.shorten(LAYOUT, EMBEDS, POSITIONS)
    visual = EMBEDS[IS_VISUAL].reshape(2, 7, 2)
    found = short.embeds.gather(1, short.visual[..., None].expand(-1, -1, 2))
    assert torch.allclose(found, weights @ visual)
    assert torch.equal(reduction.merged(visual), weights @ visual)
    text = ~IS_VISUAL.gather(1, short.index)
    assert torch.equal(short.embeds[text], EMBEDS[~IS_VISUAL])
    assert torch.equal(EMBEDS, torch.arange(40.0).reshape(2, 10, 2))  # unchanged


def test_positions_may_be_replaced() -> None:
    moved = torch.stack([POSITIONS[0] * 10, POSITIONS[0] * 20])
    short = Reduction.of_images(GRIDS, PER_IMAGE, positions=moved).shorten(
        LAYOUT, EMBEDS, POSITIONS.expand(2, -1, -1)
    )
    assert torch.equal(short.positions, torch.stack([short.index * 10, short.index * 20]))
