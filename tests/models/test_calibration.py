"""Calibration of every family matches brute force in float64 and leads to a served model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from zoo import PROMPTS, Row, Specimen

import yopo
from yopo.calibration import measure as run
from yopo.calibration.observers import observing
from yopo.calibration.running import Running
from yopo.calibration.statistics import MAX_DISTANCE, Statistics
from yopo.checkpoint.bake import bake
from yopo.data.prompts import Batch
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest
from yopo.plans.file import to_yaml
from yopo.plans.storage import to_bytes
from yopo.runtime.install import pruned

ROWS = PROMPTS["padded, different images"]


def watch(specimen: Specimen, inputs: dict[str, Any]) -> Running:
    model = specimen.model
    with observing(model, specimen.identity.shape, specimen.family) as observer, torch.no_grad():
        observer.begin(inputs["attention_mask"])
        model.base_model(**inputs, use_cache=False)
        return observer.finish()


@torch.no_grad()
def eager(specimen: Specimen, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """(layers, batch, heads, queries, keys) attention and (layers, batch, tokens, ffn), float64.

    It builds its own matrices, because stock eager attention gives NaN for padding in float64.
    """
    oracle, taken, activations, read = specimen.oracle, [], [], []

    def attend(module, query, key, value, attention_mask, scaling, **_):
        group = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(group, dim=1).transpose(-1, -2) * scaling
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        allowed = allowed if attention_mask is None else attention_mask
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
        taken.append(weights)
        read.append(key)
        return (weights @ value.repeat_interleave(group, dim=1)).transpose(1, 2), None

    AttentionInterface.register("yopo_brute", attend)
    AttentionMaskInterface.register("yopo_brute", sdpa_mask)
    names, decoder = specimen.family.backbone(oracle.config), oracle.get_decoder()
    before = decoder.config._attn_implementation
    handles = [
        getattr(layer.mlp, names.down).register_forward_pre_hook(
            lambda module, args: activations.append(args[0])
        )
        for layer in decoder.layers
    ]
    decoder.set_attn_implementation("yopo_brute")
    try:
        found = tiny.logits(oracle, inputs)
    finally:
        decoder.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
    where = inputs["attention_mask"].bool()
    assert torch.allclose(found[where], tiny.logits(oracle, inputs)[where], atol=1e-9)
    return torch.stack(taken), torch.stack(activations), torch.stack(read)


def cells(specimen: Specimen, row: Row) -> list[tuple[int, int, int]]:
    """Return (image, row, column) of each visual token in a prompt."""
    return [
        (image, place // grid.cols, place % grid.cols)
        for image, grid in enumerate(specimen.workload(row).grids)
        for place in range(grid.tokens)
    ]


def brute_force(specimen: Specimen, rows: Sequence[Row]) -> tuple[torch.Tensor, ...]:
    """Compute (rho, cross-modal sum, locality sum, squared activations) by definition."""
    inputs = specimen.inputs(rows)
    weights, activations, keys = eager(specimen, inputs)
    is_text, real = specimen.text_positions(inputs), inputs["attention_mask"].bool()
    rho, cross, squares, key_squares = [], 0, 0, 0
    locality = torch.zeros(weights.shape[0], MAX_DISTANCE + 2, dtype=torch.float64)
    for number, row in enumerate(rows):
        visual = real[number] & ~is_text[number]
        places = visual.nonzero().flatten().tolist()
        after = is_text[number] & (torch.arange(len(visual)) > places[0])
        asked = weights[:, number][:, :, after]  # (layers, heads, queries, keys)
        seen = asked[..., visual].sum(-1)
        rho.append(seen.sum(-1) / asked[..., ~visual].sum((-1, -2)))
        cross = cross + seen.mean(1).sum(-1)
        squares = squares + activations[:, number, visual].square().sum(1)
        key_squares = key_squares + keys[:, number][:, :, visual].square().sum(2)
        where = cells(specimen, row)
        for query, (image, *cell) in zip(places, where, strict=True):
            for key, (other, *place) in zip(places, where, strict=True):
                distance = max(abs(cell[0] - place[0]), abs(cell[1] - place[1]))
                column = min(distance, MAX_DISTANCE) if image == other else MAX_DISTANCE + 1
                locality[:, column] += weights[:, number, :, query, key].mean(1)
    return torch.stack(rho), cross, locality, squares, key_squares


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def test_calibration_matches_brute_force(specimen: Specimen) -> None:
    rho, cross, locality, squares, key_squares = brute_force(specimen, ROWS)
    found = watch(specimen, specimen.inputs(ROWS))
    assert (found.rho[0].double() / rho - 1).abs().max() < 5e-5  # float32 against float64
    assert relative(found.sums["cross_modal_sum"], cross) < 1e-5
    assert relative(found.sums["locality_sum"], locality) < 1e-5
    assert relative(found.sums["neuron_square"], squares) < 1e-5
    assert relative(found.sums["key_square_sum"], key_squares) < 1e-5
    assert list(found.grids) == [specimen.workload(row).grids for row in ROWS]


def test_observing_does_not_change_the_model(specimen: Specimen) -> None:
    inputs = specimen.inputs(ROWS)
    before = tiny.logits(specimen.model, inputs)
    with observing(specimen.model, specimen.identity.shape, specimen.family) as observer:
        observer.begin(inputs["attention_mask"])
        inside = tiny.logits(specimen.model, inputs)
    assert torch.equal(inside, before)
    assert torch.equal(tiny.logits(specimen.model, inputs), before)


def measured(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> Statistics:
    """Statistics of zoo prompts, which replace pairs and a processor's output."""
    monkeypatch.setattr(
        run, "encode_for", lambda _, __, group: Batch(specimen.inputs(group), None, group)
    )
    monkeypatch.setattr(run, "by_size", iter)  # prompts of the zoo have no image files
    pairs = [*ROWS, *PROMPTS["two images"], *PROMPTS["one image"]]
    return run.measure(specimen.model, None, pairs, name="tiny", batch_size=2)


def test_the_workload_says_where_the_text_stands(
    specimen: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, between and inside images, as the prompt's tokens have it."""
    row: Row = (1, 5, 6, "L", 7, 8, "A", 9, 2)
    monkeypatch.setattr(
        run, "encode_for", lambda _, __, group: Batch(specimen.inputs(group), None, group)
    )
    monkeypatch.setattr(run, "by_size", iter)
    found = run.measure(specimen.model, None, [row, row, row], name="tiny", batch_size=2).workload
    expected = specimen.workload(row)
    assert found == expected
    assert sum(expected.text_between) >= 2


# 7. Same inputs, same plan, byte for byte.


def test_the_same_pairs_give_the_same_bytes(
    specimen: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [make_plan(measured(specimen, monkeypatch), BudgetRequest(0.4)) for _ in range(2)]
    (plan, _), (again, _) = made
    assert to_yaml(plan) == to_yaml(again)
    assert to_bytes(plan.tensors) == to_bytes(again.tensors)


@pytest.mark.parametrize("template", ["paper", "reader-heads"])
def test_pairs_lead_to_a_served_model(
    specimen: Specimen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, template: str
) -> None:
    request = BudgetRequest(0.5, template=template)
    plan, _ = make_plan(measured(specimen, monkeypatch), request)
    assert 0.3 < plan.budget.reached <= 0.5
    specimen.model.save_pretrained(tmp_path / "source")
    bake(plan, tmp_path / "source", tmp_path / "out")
    model = yopo.load(tmp_path / "out")
    inputs = specimen.inputs(ROWS)
    with pruned(specimen.model, plan):
        usual = tiny.logits(specimen.model, inputs)
        said = specimen.generate(specimen.model, inputs)
    with pruned(specimen.oracle, plan):
        oracle = tiny.logits(specimen.oracle, inputs)
    where = specimen.text_positions(inputs)
    tiny.assert_close(tiny.logits(model, inputs), usual, oracle, where)
    assert torch.equal(specimen.generate(model, inputs), said)
