"""The maps of where text looks are the attention weights of the stock model, counted by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from zoo import Specimen

from yopo.data.prompts import Batch
from yopo.evaluation.looks import View, looks_of
from yopo.plans.schema import PruningPlan, full_plan
from yopo.reduction.registry import make_method
from yopo.runtime import reference as specification
from yopo.runtime.reference import reference

PROCESSOR = SimpleNamespace(
    image_processor=SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
)
ROWS = {"one image": (1, 5, "A", 7, 8, 9, 10), "two images": (1, 5, "A", 6, "B", 7, 8, 9)}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def views_of(specimen: Specimen, plan: PruningPlan, row: tuple[int | str, ...]) -> list[View]:
    inputs = tiny.as_dtype(specimen.inputs([row]), torch.float64)
    images = [Image.new("RGB", (8, 8)) for piece in row if isinstance(piece, str)]
    return looks_of(specimen.oracle, PROCESSOR, plan, Batch(inputs, None, ()), images)


def stock_weights(specimen: Specimen, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """(heads, queries, keys) of every layer, as the stock model returns them."""
    model = copy.deepcopy(specimen.oracle)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**tiny.as_dtype(inputs, torch.float64), output_attentions=True)
    return [each[0] for each in found.attentions]


def counted(
    specimen: Specimen, plan: PruningPlan, weights: list[torch.Tensor], ids: torch.Tensor
) -> list[float]:
    """Head by head, query by query: the mean over the plan's heads and the text after an image."""
    visual = [int(token) in specimen.entry.placeholders for token in ids]
    places = [place for place, is_visual in enumerate(visual) if is_visual]
    queries = [place for place in range(places[0], len(ids)) if not visual[place]]
    seen = [
        weights[layer][head, query, places]
        for layer, part in enumerate(plan.layers)
        for head in part.read_heads
        for query in queries
    ]
    return torch.stack(seen).mean(dim=0).tolist()


def check(
    specimen: Specimen, row: tuple[int | str, ...], views: list[View], **expected: list[float]
) -> None:
    """Every view's maps lie somewhere in the prompt's, and they follow each other."""
    images = [specimen.entry.pictures[piece] for piece in row if isinstance(piece, str)]
    tiles = [image.size for image in images if isinstance(image.size, int)]
    if len(images) > 1 and sum(tiles) > len(images):
        assert not views, "nothing says which tiles belong to which image"
        return
    assert len(views) == len(images)
    for name, each in expected.items():
        check_maps(views, name, each)


def check_maps(views: list[View], name: str, expected: list[float]) -> None:
    start = 0
    for view in views:
        found = torch.tensor(getattr(view, name), dtype=torch.float64)
        size = view.grid.tokens
        starts = [
            at
            for at in range(start, len(expected) - size + 1)
            if torch.allclose(found, torch.tensor(expected[at : at + size]).double(), atol=2e-5)
        ]
        assert len(starts) == 1 and len(found) == size, name
        start = starts[0] + size


def random_reads(specimen: Specimen, seed: int, **fixed: Any) -> PruningPlan:
    """A random plan in which some head reads."""
    plans = (specimen.plan(each, **fixed) for each in range(seed, seed + 100))
    return next(plan for plan in plans if any(layer.read_heads for layer in plan.layers))


@rows
def test_the_whole_plans_maps_are_the_stock_models(
    specimen: Specimen, row: tuple[int | str, ...]
) -> None:
    inputs = specimen.inputs([row])
    plan = full_plan(specimen.identity, specimen.workload(row))
    weights = stock_weights(specimen, inputs)
    expected = counted(specimen, plan, weights, inputs["input_ids"][0])
    views = views_of(specimen, plan, row)
    check(specimen, row, views, dense=expected, pruned=expected)


@rows
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_dense_map_is_the_stock_models_in_the_plans_heads(
    specimen: Specimen, row: tuple[int | str, ...], bidirectional: bool
) -> None:
    inputs = specimen.inputs([row])
    plan = random_reads(specimen, 7, bidirectional=bidirectional)
    weights = stock_weights(specimen, inputs)
    expected = counted(specimen, plan, weights, inputs["input_ids"][0])
    check(specimen, row, views_of(specimen, plan, row), dense=expected)


@rows
@pytest.mark.parametrize(
    "seed", range(4), ids=("whole", "in few bits", "as latents", "of reduced tokens")
)
def test_the_pruned_map_is_the_specifications(
    specimen: Specimen,
    row: tuple[int | str, ...],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = specimen.inputs([row])
    plan = random_reads(specimen, 10 * seed)
    if seed == 3:
        layers = [replace(layer, radius=None) for layer in plan.layers]
        plan = replace(plan.with_layers(layers), reduction=make_method("divprune", 0.5))
    elif seed:
        plan = (tiny.in_few_bits if seed == 1 else tiny.as_latents)(plan, seed)
    weights: list[torch.Tensor] = []

    class Spying(specification.LayerSpec):
        def attention(self, module: Any, *args: Any) -> torch.Tensor:
            with monkeypatch.context() as patch:
                softmax = torch.Tensor.softmax

                def spy(scores: torch.Tensor, dim: int) -> torch.Tensor:
                    found = softmax(scores, dim)
                    weights.append(found[0])
                    return found

                patch.setattr(torch.Tensor, "softmax", spy)
                return super().attention(module, *args)

    monkeypatch.setattr(specification, "LayerSpec", Spying)
    with reference(specimen.oracle, plan):
        tiny.logits(specimen.oracle, inputs)
    assert len(weights) == specimen.identity.shape.layers
    expected = counted(specimen, plan, weights, inputs["input_ids"][0])
    check(specimen, row, views_of(specimen, plan, row), pruned=expected)
