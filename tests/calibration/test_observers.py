"""Calibration measures the same as brute force over eager attention matrices in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, SIDE, Subject

from yopo.calibration.batch_view import CHUNK
from yopo.calibration.observers import QUERIES, observing
from yopo.calibration.statistics import MAX_DISTANCE
from yopo.models.registry import family_of
from yopo.support.errors import DataError

ROWS = [
    [1, 5, 6, *PICTURE, 7, 8, 9, 10],
    [1, *PICTURE, 3, 4, *PICTURE, 9],
    [*PICTURE, *PICTURE, *(range(2, 90))],  # two chunks of text queries
]


@dataclass
class Sums:
    """Sums over samples of the brute force, in float64."""

    rho: torch.Tensor
    cross_modal: torch.Tensor
    locality: torch.Tensor
    neuron_square: torch.Tensor
    neuron_sum: torch.Tensor
    head_sum: torch.Tensor
    head_effect: torch.Tensor
    text_norm: torch.Tensor
    text_queries: int


def watch(
    subject: Subject,
    inputs: dict[str, torch.Tensor],
    queries: str = "text",
    *,
    in_float64: bool = False,
):
    """Run the observer over one batch, of the float32 model or of its float64 oracle."""
    model = subject.oracle if in_float64 else subject.model
    inputs = tiny.as_dtype(inputs, model.dtype)
    family = family_of(model.config)
    with observing(model, subject.shape, family, queries) as observer:
        observer.begin(inputs["attention_mask"])
        with torch.no_grad():
            model.base_model(**inputs, use_cache=False)
        return observer.finish()


def brute_force(subject: Subject, rows: list[list[int]], queries: str) -> Sums:
    """Compute everything by definition, per sample, from float64 ``output_attentions``."""
    parts = []
    for number, row in enumerate(rows):
        parts.append(one_sample(subject, row, queries, seed=number))
    rho, *sums, counts = zip(*parts, strict=True)
    return Sums(torch.stack(rho), *(sum(each) for each in sums), sum(counts))


@torch.no_grad()
def one_sample(subject: Subject, row: list[int], queries: str, *, seed: int) -> tuple:
    oracle, shape = subject.oracle, subject.shape
    inputs = tiny.as_dtype(tiny.batch([row], seed=seed), torch.float64)
    taken: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(oracle.get_decoder().layers):
        watched = {"ffn": layer.mlp.down_proj, "heads": layer.self_attn.o_proj, "input": layer}
        for name, module in watched.items():

            def keep(module, args, key=(name, index)):
                taken[key] = args[0][0]

            handles.append(module.register_forward_pre_hook(keep))

        def keep_values(module, args, output, key=("values", index)):
            taken[key] = output[0]

        handles.append(layer.self_attn.v_proj.register_forward_hook(keep_values))
    oracle.set_attn_implementation("eager")
    try:
        attentions = oracle(**inputs, output_attentions=True).attentions
    finally:
        oracle.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    visual = inputs["input_ids"][0] == IMAGE
    places = visual.nonzero().flatten().tolist()
    after = [q for q in range(len(row)) if not visual[q] and q > places[0]]
    counted = {"text": after, "all": list(range(len(row))), "last": [len(row) - 1]}[queries]
    weights = torch.stack([each[0] for each in attentions])  # (layers, heads, queries, keys)
    rho = weights[:, :, counted][..., visual].sum((2, 3))
    rho = rho / weights[:, :, counted][..., ~visual].sum((2, 3))
    cross_modal = weights[:, :, after][..., visual].sum(-1).mean(1).sum(-1)
    locality = torch.zeros(shape.layers, MAX_DISTANCE + 2, dtype=torch.float64)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            (image, cell), (other, place) = divmod(i, SIDE**2), divmod(j, SIDE**2)
            distance = max(abs(cell // SIDE - place // SIDE), abs(cell % SIDE - place % SIDE))
            column = distance if image == other else MAX_DISTANCE + 1
            locality[:, column] += weights[:, :, query, key].mean(dim=1)
    ffn = torch.stack([taken["ffn", index][visual] for index in range(shape.layers)])
    heads = torch.stack([taken["heads", index][visual] for index in range(shape.layers)])
    squares, sums = ffn.square().sum(1), (ffn.sum(1), heads.sum(1))
    effect = reading_effect(subject, taken, weights[:, :, after], visual)
    norms = torch.stack([taken["input", index][after] for index in range(shape.layers)])
    norm = norms.square().sum((1, 2))
    return rho, cross_modal, locality, squares, *sums, effect, norm, len(after)


def reading_effect(subject: Subject, taken: dict, weights: torch.Tensor, visual: torch.Tensor):
    """Return (layers, heads): how hiding the image from one head changes the layer's output."""
    shape, effect = subject.shape, torch.zeros(subject.shape.layers, subject.shape.heads).double()
    for index, layer in enumerate(subject.oracle.get_decoder().layers):
        values = taken["values", index].unflatten(-1, (-1, shape.head_dim)).transpose(0, 1)
        values = values.repeat_interleave(shape.group, dim=0)
        hidden = weights[index].masked_fill(visual, 0.0)
        hidden = hidden / hidden.sum(-1, keepdim=True)
        change = (weights[index] - hidden) @ values  # (heads, queries, head_dim)
        for head in range(shape.heads):
            columns = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
            output = change[head] @ layer.self_attn.o_proj.weight[:, columns].T
            effect[index, head] = output.square().sum()
    return effect


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Build one batch with the same images that ``one_sample`` draws row by row."""
    inputs = tiny.batch(rows)
    images = [tiny.batch([row], seed=number)["pixel_values"] for number, row in enumerate(rows)]
    return {**inputs, "pixel_values": torch.cat(images)}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("queries", QUERIES)
def test_a_padded_batch_matches_brute_force(subject: Subject, queries: str) -> None:
    assert len(ROWS[2]) - 2 * len(PICTURE) > CHUNK
    expected = brute_force(subject, ROWS, queries)
    found = watch(subject, padded(ROWS), queries)
    rho = found.rho[0].double()
    assert (rho / expected.rho - 1).abs().max() < 2e-5  # float32 forward against float64
    assert relative(found.sums["cross_modal_sum"], expected.cross_modal) < 1e-5
    assert relative(found.sums["locality_sum"], expected.locality) < 1e-5
    assert relative(found.sums["neuron_square"], expected.neuron_square) < 1e-5
    assert relative(found.sums["neuron_sum"], expected.neuron_sum) < 1e-5
    assert relative(found.sums["head_sum"].flatten(1), expected.head_sum) < 1e-5
    assert relative(found.sums["head_effect_sum"], expected.head_effect) < 1e-5
    assert relative(found.sums["text_norm_sum"], expected.text_norm) < 1e-5
    assert found.text_queries == expected.text_queries
    assert found.visual_tokens == sum(row.count(IMAGE) for row in ROWS)


@pytest.mark.parametrize("queries", QUERIES)
def test_rho_is_exact_to_1e_5_if_the_forward_is(subject: Subject, queries: str) -> None:
    """Checked row by row on the float64 model, because padding shifts RoPE's float32 angles."""
    for row in ROWS:
        expected = brute_force(subject, [row], queries)
        found = watch(subject, tiny.batch([row]), queries, in_float64=True)
        assert (found.rho[0].double() / expected.rho - 1).abs().max() < 1e-5
        assert relative(found.sums["head_effect_sum"], expected.head_effect) < 1e-5


def test_observing_does_not_change_the_model(subject: Subject) -> None:
    inputs = padded(ROWS[:2])
    before = tiny.logits(subject.model, inputs)
    family = family_of(subject.model.config)
    with observing(subject.model, subject.shape, family) as observer:
        observer.begin(inputs["attention_mask"])
        inside = tiny.logits(subject.model, inputs)
    assert torch.equal(before, inside)
    assert torch.equal(before, tiny.logits(subject.model, inputs))


def test_an_exception_removes_all_observers(mha: Subject) -> None:
    model, decoder = mha.model, mha.model.get_decoder()
    implementation = decoder.config._attn_implementation
    family = family_of(model.config)
    with pytest.raises(RuntimeError, match="on purpose"):
        with observing(model, mha.shape, family):
            raise RuntimeError("on purpose")
    assert decoder.config._attn_implementation == implementation
    assert not model.base_model._forward_pre_hooks and not model.base_model._forward_hooks
    for layer in decoder.layers:
        assert not hasattr(layer.self_attn, "_yopo_observer")
        assert not layer.self_attn.o_proj._forward_pre_hooks
        assert not layer.mlp.down_proj._forward_pre_hooks
        assert not layer._forward_pre_hooks


def test_no_full_attention_matrix_is_formed(mha: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from yopo.calibration import observers

    seen = []
    softmax = observers.softmax

    def spy(*args):
        weights = softmax(*args)
        seen.append(weights.shape[2])
        return weights

    monkeypatch.setattr(observers, "softmax", spy)
    watch(mha, tiny.batch([[1, *PICTURE * 8, 3, 4]]), "all")
    assert seen and max(seen) <= CHUNK < 8 * len(PICTURE)


def test_an_image_that_no_text_follows_is_an_error(mha: Subject) -> None:
    with pytest.raises(DataError, match="no text after its image"):
        watch(mha, tiny.batch([[1, 2, *PICTURE]]))
