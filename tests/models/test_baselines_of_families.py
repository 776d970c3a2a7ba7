"""On every family, baselines are stock if they drop nothing, else correct or refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from zoo import Row, Specimen

from yopo.baselines.baseline import Baseline
from yopo.baselines.downsample import Downsampling, pool
from yopo.baselines.dropping import Dropping
from yopo.baselines.fastv import FastV
from yopo.baselines.install import baseline
from yopo.baselines.prefill import Between
from yopo.baselines.random import RandomTokens
from yopo.baselines.registry import BASELINES
from yopo.baselines.vtw import TokenWithdrawal
from yopo.bench.result import BenchOptions
from yopo.bench.run import Sizes, bench_model
from yopo.models.registry import family_of
from yopo.plans.schema import LayerPlan, full_layer
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference
from yopo.support.errors import ModelError

LAYERS = 4
PROMPTS: dict[str, list[Row]] = {
    "two images": [[1, 5, "A", 6, "B", 7, 8, 9]],
    "padded": [[1, 5, 6, "B", 7, 8], [1, 5, 6, 4, 9, "B", 7, 8, 3]],
}
MIXED: Row = (1, 5, "L", 6, "C", 7, 8, 9)
NOTHING = (
    TokenWithdrawal(LAYERS),
    FastV(2, share=1.0),
    Downsampling(),
    RandomTokens(0, share=1.0),
    RandomTokens(2, share=1.0),
)


def pools(specimen: Specimen) -> bool:
    return not specimen.family.ends_rows(specimen.model.config)


@pytest.fixture(scope="module")
def stock(specimen: Specimen) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of every prompt, what the stock model finds, what is exact, and what it says."""
    found = {}
    for name, rows in PROMPTS.items():
        inputs = specimen.inputs(rows)
        usual, oracle = (tiny.logits(each, inputs) for each in (specimen.model, specimen.oracle))
        found[name] = usual, oracle, specimen.generate(specimen.model, inputs)
    return found


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("method", NOTHING, ids=str)
def test_dropping_nothing_is_the_stock_model(
    specimen: Specimen, stock: dict, method: Baseline, prompt: str
) -> None:
    model, inputs = specimen.model, specimen.inputs(PROMPTS[prompt])
    if method.name == "downsample" and not pools(specimen):
        with pytest.raises(ModelError, match="newline"), baseline(model, method):
            pass
        return
    usual, oracle, said = stock[prompt]
    with baseline(model, method):
        found = tiny.logits(model, inputs)
        assert torch.equal(specimen.generate(model, inputs), said)
    tiny.assert_close(found, usual, oracle, inputs["attention_mask"].bool())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_withdrawal_is_the_plan_of_whole_then_empty_layers(specimen: Specimen, prompt: str) -> None:
    shape, inputs = specimen.identity.shape, specimen.inputs(PROMPTS[prompt])
    whole = LayerPlan(
        tuple(range(shape.heads)),
        attend_heads=tuple(range(shape.heads)),
        radius=None,
        neurons=shape.ffn,
    )
    none = LayerPlan((), attend_heads=(), radius=None, neurons=0)
    plan = specimen.plan(
        0, layers=(whole, none, none, none), compensation="none", bidirectional=False
    )
    with reference(specimen.oracle, plan, check=False):
        oracle = tiny.logits(specimen.oracle, inputs)
    with pruned(specimen.model, plan):
        usual, said = tiny.logits(specimen.model, inputs), specimen.generate(specimen.model, inputs)
    with baseline(specimen.model, TokenWithdrawal(1)):
        found = tiny.logits(specimen.model, inputs)
        assert torch.equal(specimen.generate(specimen.model, inputs), said)
    tiny.assert_close(found, usual, oracle, specimen.text_positions(inputs))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_mask_simulation_matches_the_reference(specimen: Specimen, prompt: str) -> None:
    inputs = specimen.inputs(PROMPTS[prompt])
    plan = specimen.plan(1)
    with reference(specimen.model, plan):
        usual = tiny.logits(specimen.model, inputs)
    with reference(specimen.oracle, plan, check=False):
        oracle = tiny.logits(specimen.oracle, inputs)
    with pruned(specimen.model, plan):
        said = specimen.generate(specimen.model, inputs)
    with baseline(specimen.model, "masked", plan):
        found = tiny.logits(specimen.model, inputs)
        assert torch.equal(specimen.generate(specimen.model, inputs), said)
    tiny.assert_close(found, usual, oracle, specimen.text_positions(inputs))


@torch.no_grad()
def brute_row(specimen: Specimen, inputs: dict[str, Any]) -> torch.Tensor:
    """Return (keys,): the last token's eager attention in layer 1, averaged over heads."""
    model = specimen.model
    model.set_attn_implementation("eager")
    try:
        shown = model(**inputs, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    return shown.attentions[1][0, :, -1].mean(dim=0)


def test_fastv_keeps_what_the_last_token_attends_to(specimen: Specimen) -> None:
    inputs = specimen.inputs(PROMPTS["two images"])
    visual = torch.isin(inputs["input_ids"][0], torch.tensor(specimen.entry.placeholders))
    method = FastV(2, share=0.4)
    count = method.kept(int(visual.sum()))
    row = brute_row(specimen, inputs).masked_fill(~visual, -1.0)
    expected = torch.cat([row.topk(count).indices, (~visual).nonzero()[:, 0]]).sort().values
    with torch.no_grad(), baseline(specimen.model, method):
        cache = specimen.model(**inputs, use_cache=True).past_key_values
        places = cache.layers[2].record.stretch(3).places
        said = specimen.generate(specimen.model, inputs)
        again = specimen.generate(specimen.model, inputs, max_new_tokens=1, min_new_tokens=1)
    assert torch.equal(places[0], expected)
    assert cache.layers[1].keys.shape[2] == len(visual) > cache.layers[2].keys.shape[2]
    assert torch.equal(said[:, : again.shape[1]], again)


class BetweenLayers(RandomTokens):
    """Drops the same tokens between the embeddings and the first layer instead of before both."""

    def reduce(self, *_: object) -> None:
        return None

    def keep(self, between: Between) -> torch.Tensor | None:
        return Dropping.keep(self, between)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_early_reduction_equals_a_drop_before_the_first_layer(
    specimen: Specimen, prompt: str
) -> None:
    """Positions with several axes and features that later layers add are kept in both cases."""
    model, inputs = specimen.model, specimen.inputs(PROMPTS[prompt])
    found = []
    for kind in (RandomTokens, BetweenLayers):
        with baseline(model, kind(0, share=0.5)):
            found.append((tiny.logits(model, inputs), specimen.generate(model, inputs)))
    (reduced, said), (dropped, same) = found
    assert torch.equal(reduced, dropped) and torch.equal(said, same)
    where = specimen.text_positions(inputs)
    assert not torch.allclose(reduced[where], tiny.logits(model, inputs)[where], atol=1e-3)


def test_pooled_images_have_the_positions_of_smaller_ones(specimen: Specimen) -> None:
    """M-RoPE: rows and columns are the smaller grid's, and text follows without a gap."""
    model = specimen.model.base_model
    if not hasattr(model, "get_rope_index"):
        pytest.skip("positions are one number per token")
    inputs = specimen.inputs([MIXED])
    method = Downsampling(scale=(0.5, 0.67))
    seen = []
    handle = model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        with baseline(specimen.model, method):
            tiny.logits(specimen.model, inputs)
            specimen.generate(specimen.model, inputs, max_new_tokens=2, min_new_tokens=2)
    finally:
        handle.remove()
    ids, kinds, sizes = shortened(specimen, inputs, method)
    expected, delta = model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=sizes)
    prefill, again, step = seen
    assert torch.equal(prefill, expected) and torch.equal(again, expected)
    assert step.shape == (3, 1, 1) and bool((step == ids.shape[1] + delta).all())


def shortened(specimen: Specimen, inputs: dict[str, Any], method: Downsampling) -> tuple:
    """Return ids, kinds and sizes of a prompt whose images have the smaller grids at once."""
    ids, kinds = inputs["input_ids"][0].tolist(), inputs["mm_token_type_ids"][0].tolist()
    merge = specimen.model.config.vision_config.spatial_merge_size
    grids = specimen.workload(MIXED).grids
    smaller = [method.grid(grid) for grid in grids]
    short_ids, short_kinds, place = [], [], 0
    images = iter(zip(grids, smaller, strict=True))
    while place < len(ids):
        step, repeat = 1, 1
        if kinds[place]:
            old, new = next(images)
            step, repeat = old.tokens, new.tokens
        short_ids += [ids[place]] * repeat
        short_kinds += [kinds[place]] * repeat
        place += step
    sizes = torch.tensor([[1, new.rows * merge, new.cols * merge] for new in smaller])
    return torch.tensor([short_ids]), torch.tensor([short_kinds]), sizes


def test_videos_are_not_pooled(specimen: Specimen) -> None:
    if "V" not in specimen.entry.pictures:
        pytest.skip("takes no videos")
    inputs = specimen.inputs([[1, 5, "V", 6, 7, 8]])
    method = Downsampling(scale=(0.5, 0.5))
    with baseline(specimen.model, method):
        if specimen.entry.name == "qwen3-vl":  # a run per frame: each is placed like an image
            assert tiny.logits(specimen.model, inputs).isfinite().all()
            return
        with pytest.raises(ModelError, match="frames"):
            tiny.logits(specimen.model, inputs)


def test_pooling_is_a_mean_over_areas() -> None:
    features = torch.arange(24.0).reshape(1, 12, 2)
    grids = tiny.fixed_grids([(3, 4)])()[0]
    smaller = tiny.fixed_grids([(1, 2)])()[0]
    cells = features.reshape(3, 2, 2, 2)  # rows, halves, columns of a half, width
    assert torch.allclose(pool(features, grids, smaller)[0], cells.mean(dim=(0, 2)))


def test_baselines_are_timed_on_the_models_own_images(specimen: Specimen) -> None:
    plan = specimen.plan(3, workload=specimen.workload([1, 5, 6, "L", 7, 8, 9]))
    options = BenchOptions(
        runs=1,
        warmup=0,
        decode_steps=1,
        baselines=tuple(BASELINES),
        may_leave_out=True,
        contexts=(300,),
    )
    plan = plan.with_layers([full_layer(plan.model.shape)] * 3 + [plan.layers[0]])
    found = bench_model(specimen.model, plan, Sizes(), options)
    missing = set() if pools(specimen) else {"downsample", "grid"}  # rows that end in tokens
    if family_of(specimen.model.config).class_attention(specimen.model.config) is None:
        missing |= {"scope", "prumerge", "prumerge+"}  # nothing to rank patches by
    assert list(found.left_out) == [name for name in BASELINES if name in missing]
    for name, measured in found.measured.items():
        assert measured.visual_kv == found.planned_kv_of(name), name
    (at,) = found.contexts
    assert all(each.ratio.median > 0 for each in at.decode.values())
