"""Stock decoders behind a reduction compute what the pruned ones do that prune nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from zoo import PROMPTS, Specimen

from yopo.calibration.observers import observing
from yopo.data.prompts import Batch
from yopo.fitting.layerwise import DenseBatch, DenseWalk, enter
from yopo.models.layout import LayoutProbe
from yopo.plans.schema import full_plan
from yopo.reduction.method import Method
from yopo.reduction.registry import make_method
from yopo.runtime.install import pruned
from yopo.support.errors import DataError, ModelError

LARGE = (1, 5, 6, "L", 7, 8, 9, 10, 11, 12)
METHODS = ("divprune", "par", "folder", "prumerge")
"""One that keeps features, one that reads the prompt and merges, one that merges alone, and one
that needs the tower's attention."""


def walked(specimen: Specimen, inputs: dict[str, Any], method: Method | None) -> DenseBatch:
    """Carry a batch through all stock layers."""
    given = tiny.as_dtype(inputs, torch.float64)
    entered = enter(
        specimen.oracle, [Batch(given, None, (None,) * len(given["input_ids"]))], method
    )
    walk = DenseWalk(specimen.oracle, entered)
    for number in range(specimen.identity.shape.layers):
        walk.step(number)
    return walk.batches[0]


def real_text(batch: DenseBatch, states: torch.Tensor) -> torch.Tensor:
    """(text tokens, width) of a batch, padding left out."""
    text = batch.layout.text
    real = batch.mask.gather(1, text.index).bool()
    return text.gather(states)[real if text.mask is None else real & text.mask]


@pytest.mark.parametrize("name", METHODS)
def test_the_walk_ends_where_the_pruned_decoder_does(specimen: Specimen, name: str) -> None:
    method, decoder = make_method(name, 0.4), specimen.oracle.get_decoder()
    config = specimen.oracle.config
    if method.needs_attention and specimen.family.class_attention(config) is None:
        with pytest.raises(ModelError, match="needs the attention of a class token"):
            walked(specimen, specimen.inputs([list(LARGE)]), method)
        return
    plan = replace(full_plan(specimen.identity, specimen.workload(LARGE)), reduction=method)
    seen = 0
    for prompt, rows in PROMPTS.items():
        inputs = specimen.inputs(rows)
        if prompt == "text":
            with pytest.raises(DataError, match="holds an image"):
                walked(specimen, inputs, method)
            continue
        batch = walked(specimen, inputs, method)
        whole = walked(specimen, inputs, None)
        assert batch.layout.visual.length < whole.layout.visual.length
        with torch.no_grad(), pruned(specimen.oracle, plan):
            given = tiny.as_dtype(inputs, torch.float64)
            expected = specimen.oracle.base_model(**given, use_cache=False).last_hidden_state
        with torch.no_grad():
            found = decoder.norm(batch.hidden)
        text = real_text(whole, expected)
        torch.testing.assert_close(real_text(batch, found), text, rtol=1e-6, atol=1e-7)
        seen += 1
    assert seen > 2


def observed(specimen: Specimen, inputs: dict[str, Any], method: Method | None) -> Any:
    model, family = specimen.oracle, specimen.family
    with observing(model, specimen.identity.shape, family, "text", method) as observer:
        observer.begin(inputs["attention_mask"])
        with torch.no_grad():
            model.base_model(**tiny.as_dtype(inputs, torch.float64), use_cache=False)
        return observer.finish()


def test_measures_are_those_of_the_tokens_that_are_left(specimen: Specimen) -> None:
    """Norms of the text's states are those of the pruned decoder; counts those of the choice."""
    method = make_method("divprune", 0.4)
    inputs = specimen.inputs([LARGE])
    found, whole = (observed(specimen, inputs, each) for each in (method, None))
    assert found.grids == whole.grids
    assert found.text_tokens == whole.text_tokens and found.text_queries == whole.text_queries
    kept = sum(method.count((each.rows, each.cols)) for each in specimen.workload(LARGE).grids)
    assert found.visual_tokens == kept < whole.visual_tokens
    batch = walked(specimen, inputs, method)
    plan = replace(full_plan(specimen.identity, specimen.workload(LARGE)), reduction=method)
    norms: list[float] = []
    first = int(batch.layout.visual.index[0, 0])

    def note(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        norms.append(float(args[0][0, first:].square().sum()))

    names = specimen.family.backbone(specimen.model.config)
    handles = [
        getattr(layer, names.attention_norm).register_forward_pre_hook(note)
        for layer in specimen.oracle.get_decoder().layers
    ]
    try:
        with torch.no_grad(), pruned(specimen.oracle, plan):
            given = tiny.as_dtype(inputs, torch.float64)
            specimen.oracle.base_model(**given, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    streams = len(norms) // specimen.identity.shape.layers
    assert streams in (1, 2)  # some layers norm text and visual tokens in one call each
    text = torch.tensor(norms[::streams], dtype=torch.float64)
    torch.testing.assert_close(found.sums["text_norm_sum"], text, rtol=1e-4, atol=1e-8)


def test_rows_of_a_batch_count_as_alone(specimen: Specimen) -> None:
    method, rows = make_method("divprune", 0.4), PROMPTS["padded, different images"]
    together = observed(specimen, specimen.inputs(rows), method)
    assert len(together.rho[0]) == len(rows)
    counts = [each for grids in together.grids.elements() for each in grids]
    expected = sum(method.count((each.rows, each.cols)) for each in counts)
    assert together.visual_tokens == expected


def test_keeping_all_tokens_measures_all(specimen: Specimen) -> None:
    inputs = specimen.inputs(PROMPTS["one image"])
    found, whole = (observed(specimen, inputs, each) for each in (make_method("par", 1.0), None))
    assert all(torch.equal(found.sums[name], whole.sums[name]) for name in whole.sums)
    assert torch.equal(found.rho[0], whole.rho[0])


def test_nothing_is_left_behind(specimen: Specimen) -> None:
    inputs = specimen.inputs([LARGE])
    before = tiny.logits(specimen.oracle, inputs)
    observed(specimen, inputs, make_method("folder", 0.4))
    walked(specimen, inputs, make_method("folder", 0.4))
    assert torch.equal(tiny.logits(specimen.oracle, inputs), before)
    probe = LayoutProbe(specimen.oracle.base_model, specimen.family.grids_of)
    probe.remove()
    decoder = specimen.oracle.get_decoder()
    assert not decoder._forward_pre_hooks
