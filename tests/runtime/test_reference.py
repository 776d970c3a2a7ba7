"""The specification's masks match plain loops written after yopo/README.md."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject

from yopo.models.streams import build_layout
from yopo.plans.grid import Grid
from yopo.plans.schema import LayerPlan
from yopo.runtime.install import pruned
from yopo.runtime.reference import LayerSpec, reference

ROW = [1, 5, *[IMAGE] * 6, 7, *[IMAGE] * 4, *[IMAGE] * 3, 8, 9]
GRIDS = [(2, 3), (4, 1), (1, 3)]


def places() -> list[tuple[int, int, int] | None]:
    """Return (image, row, column) of every token in ``ROW``; None for text."""
    cells = [
        (image, row, col)
        for image, (rows, cols) in enumerate(GRIDS)
        for row in range(rows)
        for col in range(cols)
    ]
    visual = iter(cells)
    return [next(visual) if token == IMAGE else None for token in ROW]


def may_attend(layer: LayerPlan, bidirectional: bool, head: int, query: int, key: int) -> bool:
    """Decide attention literally as yopo/README.md says."""
    query_place, key_place = places()[query], places()[key]
    not_later = key <= query
    if key_place is None:
        return not_later
    if query_place is None:
        return not_later and head in layer.read_heads
    same_image = query_place[0] == key_place[0]
    distance = max(abs(query_place[1] - key_place[1]), abs(query_place[2] - key_place[2]))
    is_neighbor = layer.radius is None or (same_image and distance <= layer.radius)
    in_order = not_later or (bidirectional and same_image)
    return head in layer.attend_heads and is_neighbor and in_order


@pytest.mark.parametrize("seed", range(12))
def test_the_reference_masks_follow_the_design_page(mha: Subject, seed: int) -> None:
    rng = random.Random(seed)
    plan = tiny.random_plan(mha.identity, rng, compensation="none")
    ids = torch.tensor([ROW])
    layout = build_layout(ids == IMAGE, [tuple(Grid(*size) for size in GRIDS)])
    spec = LayerSpec(plan, 0, layout, None)
    found = spec.allowed(torch.zeros(1, len(ROW), mha.shape.hidden))[0]
    found = found.expand(mha.shape.heads, -1, -1)
    for head in range(mha.shape.heads):
        for query in range(len(ROW)):
            for key in range(len(ROW)):
                expected = may_attend(plan.layers[0], plan.bidirectional, head, query, key)
                if places()[query] is not None and head not in plan.layers[0].attend_heads:
                    continue  # such a head contributes nothing, whatever it attends
                assert found[head, query, key] == expected, (head, query, key)


@pytest.mark.parametrize("run", [reference, pruned])
def test_without_visual_reads_images_do_not_matter(subject: Subject, run: type) -> None:
    """If no layer reads, other pixels change no text logit; with reads they do."""
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    plan = subject.random_plan(0, layers=(none,) * 4, compensation="none")
    rows = [[1, 5, *PICTURE, 7, 8]]
    one, other = tiny.batch(rows, seed=1), tiny.batch(rows, seed=2)
    text = tiny.real_text(one)
    with run(subject.model, plan):
        blind = [tiny.logits(subject.model, inputs)[text] for inputs in (one, other)]
    assert torch.equal(*blind)
    sees = LayerPlan((0,), attend_heads=(), radius=None, neurons=0)
    plan = subject.random_plan(0, layers=(none, sees, none, none), compensation="none")
    with run(subject.model, plan):
        seen = [tiny.logits(subject.model, inputs)[text] for inputs in (one, other)]
    assert not torch.allclose(*seen)


@pytest.mark.parametrize("run", [reference, pruned])
def test_reading_heads_are_the_named_ones(subject: Subject, run: type) -> None:
    """Cutting off a head at the output projection hides exactly what it reads."""
    layer, head_dim = 1, subject.shape.head_dim
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    reader = subject.shape.heads - 2
    sees = LayerPlan((reader,), attend_heads=(), radius=None, neurons=0)
    plan = subject.random_plan(0, layers=(none, sees, none, none), compensation="none")
    rows = [[1, 5, *PICTURE, 7, 8]]
    one, other = tiny.batch(rows, seed=1), tiny.batch(rows, seed=2)
    text = tiny.real_text(one)
    weight = subject.model.get_decoder().layers[layer].self_attn.o_proj.weight
    before = weight.detach().clone()
    for head in range(subject.shape.heads):
        with torch.no_grad():
            weight[:, head * head_dim : (head + 1) * head_dim] = 0.0
            with run(subject.model, plan, check=False):
                pair = [tiny.logits(subject.model, inputs)[text] for inputs in (one, other)]
            weight.copy_(before)
        assert torch.equal(*pair) == (head == reader)
