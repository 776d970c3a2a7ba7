"""``yopo bench`` runs what is predicted, samples layers in their mix and leaves no trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from tiny import Subject
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from yopo.baselines.downsample import Downsampling
from yopo.baselines.registry import BASELINES, solve_for
from yopo.baselines.vtw import TokenWithdrawal
from yopo.bench import run as benching
from yopo.bench.document import document
from yopo.bench.memory import peak_bytes
from yopo.bench.plans import (
    PRESETS,
    grids_for,
    preset_plan,
    sampled_layers,
    with_layers,
    with_prompt,
)
from yopo.bench.prompt import Prompt, made_up_prompt
from yopo.bench.random_model import (
    WORKLOAD,
    fitted,
    grids_of,
    published_model,
    random_model,
)
from yopo.bench.rates import best, measure_rates
from yopo.bench.result import (
    DENSE,
    PRUNED,
    STOCK,
    BenchOptions,
    Compared,
    Rates,
    step_bytes,
)
from yopo.bench.rounds import Sample
from yopo.bench.run import Sizes, bench_model, bench_random, run_rounds
from yopo.bench.subject import Bench
from yopo.models.family import shape_of
from yopo.plans.checks import check_tensors
from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_kv_bytes,
    prefill_flops,
    visual_budget,
    visual_kv_bytes,
)
from yopo.plans.grid import Grid
from yopo.plans.made_up import MADE_UP
from yopo.plans.schema import LayerPlan, ModelIdentity, ModelShape, PruningPlan, Workload
from yopo.report.bench_tables import bench_report
from yopo.runtime import gemm
from yopo.runtime.install import pruned
from yopo.support.errors import ModelError, PlanError

SHAPE = ModelShape(layers=8, hidden=48, heads=4, kv_heads=2, head_dim=12, ffn=80)
MODEL = ModelIdentity("made-up", "llava", SHAPE, MADE_UP)
PROMPT = Workload((Grid(3, 5),), text=9, text_before=2)
QUICK = BenchOptions(runs=3, warmup=1, decode_steps=2)


def plan_for(name: str = "yopo-25", workload: Workload = PROMPT) -> PruningPlan:
    return preset_plan(name, MODEL, workload)


def subject_of(plan: PruningPlan, *, batch: int = 2) -> Bench:
    model = random_model(plan.model.shape)
    return Bench(model, plan, made_up_prompt(model, plan, batch), grids_of(plan))


@pytest.mark.parametrize(("name", "budget"), [("yopo-25", 0.25), ("yopo-12", 0.125)])
def test_presets_have_the_papers_budget_on_the_published_shape(name: str, budget: float) -> None:
    plan = preset_plan(name, published_model("llava-1.5-7b"), WORKLOAD)
    assert visual_budget(plan) == pytest.approx(budget, abs=0.01)
    assert plan.baked and plan.visual_depth == 16
    for layer in plan.layers:  # kept heads are a prefix, as baking leaves them
        assert layer.read_heads == tuple(range(len(layer.read_heads)))


def test_the_reader_preset_freezes_visual_tokens() -> None:
    plan = preset_plan("reader-12", published_model("llava-1.5-7b"), WORKLOAD)
    assert visual_budget(plan) == pytest.approx(0.12, abs=0.001)
    assert not any(layer.attend_heads for layer in plan.layers)
    assert sum(len(layer.read_heads) == 32 for layer in plan.layers) > 16


def test_the_fitted_preset_meets_its_budget_and_runs_with_made_up_weights() -> None:
    plan = preset_plan("fitted-12", published_model("llava-1.5-7b"), WORKLOAD)
    assert 0.119 < visual_budget(plan) <= 0.12
    assert all(0 < len(layer.attend_heads) < len(layer.read_heads) == 32 for layer in plan.layers)
    shape = replace(SHAPE, layers=2, hidden=128, heads=8, kv_heads=8, head_dim=16, ffn=352)
    model = replace(MODEL, shape=shape)
    small = preset_plan("fitted-12", model, Workload((Grid(6, 6),), text=20, text_before=3))
    options = BenchOptions(runs=1, warmup=0, decode_steps=1, threads=1)
    found = bench_random(small, Sizes(), options)
    assert found.plan.compensation == "refit" and found.prefill.ratio.median > 0


def look(plan: PruningPlan, index: int) -> tuple[object, ...]:
    layer = plan.layers[index]
    neurons = 2 if layer.neurons == plan.model.shape.ffn else int(layer.neurons > 0)
    gone = index >= plan.visual_depth
    return bool(layer.read_heads), bool(layer.attend_heads), layer.radius, neurons, gone


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("count", [1, 4, 7, 16, 32])
def test_sampled_layers_keep_the_mix(name: str, count: int) -> None:
    plan = preset_plan(name, published_model("llava-1.5-7b"), WORKLOAD)
    used = sampled_layers(plan, count)
    assert len(set(used)) == count and list(used) == sorted(used)
    total = Counter(look(plan, index) for index in range(32))
    found = Counter(look(plan, index) for index in used)
    for kind, number in total.items():
        assert abs(found[kind] - number * count / 32) < 1
    few = with_layers(plan, used)
    assert few.model.shape.layers == count
    assert few.layers == tuple(plan.layers[index] for index in used)


def test_samples_stay_close_to_the_whole_plans_flops() -> None:
    model = published_model("llava-1.5-7b")
    for name in PRESETS:
        plan = preset_plan(name, model, WORKLOAD)
        few = with_layers(plan, sampled_layers(plan, 4))
        whole = prefill_flops(plan) / dense_prefill_flops(model.shape, WORKLOAD)
        part = prefill_flops(few) / dense_prefill_flops(few.model.shape, WORKLOAD)
        assert part == pytest.approx(whole, rel=0.08)


@pytest.mark.parametrize("count", [0, 9])
def test_impossible_samples_are_refused(count: int) -> None:
    with pytest.raises(PlanError, match="8"):
        sampled_layers(plan_for(), count)


def test_prompts_hold_whole_images() -> None:
    assert grids_for(2880, (Grid(24, 24),)) == (Grid(24, 24),) * 5
    assert grids_for(64, (Grid(24, 24),)) == (Grid(8, 8),)
    with pytest.raises(PlanError, match="577 visual tokens"):
        grids_for(577, (Grid(24, 24),))
    moved = with_prompt(plan_for(), visual=30, text=1)
    assert moved.workload == Workload((Grid(3, 5),) * 2, text=1, text_before=1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_random_model_has_the_requested_shape(kv_heads: int) -> None:
    shape = replace(SHAPE, kv_heads=kv_heads)
    model = random_model(shape)
    assert shape_of(model.config) == shape
    weights = [each for each in model.parameters() if each.dim() == 2]
    assert len({each.data_ptr() for each in weights}) == len(weights)
    for name, parameter in model.get_decoder().named_parameters():
        assert parameter.isfinite().all(), name
        if "norm" not in name:
            assert 0.01 < parameter.std() < 0.04, name
    stock = type(model)(model.config)
    for name, buffer in model.get_decoder().named_buffers():
        assert torch.equal(buffer, dict(stock.get_decoder().named_buffers())[name]), name


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="free"):
        random_model(ModelShape(9999, 16384, 128, 128, 128, 53248))


def test_unknown_shapes_suggest_known_ones() -> None:
    with pytest.raises(ModelError, match="llava-1.5-9b") as caught:
        published_model("llava-1.5-9b")
    assert "llava-1.5-7b" in caught.value.remedy


def test_made_up_images_reach_the_decoder() -> None:
    """The dense model attends to them, and a plan that prunes nothing gives the same logits."""
    plan = plan_for()
    whole = plan.with_layers(
        [LayerPlan((0, 1, 2, 3), (0, 1, 2, 3), None, SHAPE.ffn)] * SHAPE.layers
    )
    subject = subject_of(whole)
    with torch.no_grad():
        dense = subject.prompt.prefill(subject.model).last_hidden_state
        with subject.switch(PRUNED):
            same = subject.prompt.prefill(subject.model).last_hidden_state
        with pruned(subject.model, plan, grids_of=subject.grids_of, check=False):
            other = subject.prompt.prefill(subject.model).last_hidden_state
    assert torch.allclose(dense, same, atol=1e-5)
    assert not torch.allclose(dense[:, -1], other[:, -1], atol=1e-5)


def test_a_pruned_model_without_the_planned_visual_tokens_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with a model whose forward ignores the argument by which it gets its images."""

    def without_images(prompt: Prompt, model: Any, **more: Any) -> Any:
        return model.base_model(**prompt.inputs, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Prompt, "prefill", without_images)
        with pytest.raises(ModelError, match="holds 0 bytes .* where the plan predicts [1-9]"):
            bench_random(plan_for(), Sizes(), QUICK)


def test_the_prompts_images_are_the_models_only_during_a_prefill() -> None:
    subject = subject_of(plan_for())
    base = subject.model.base_model
    before = dict(vars(base))
    subject.prefill()
    assert vars(base) == before
    with subject.switch(PRUNED):
        watched = base.get_image_features
        subject.prefill()
        assert base.get_image_features == watched
    assert vars(base) == before


@pytest.mark.parametrize("name", PRESETS)
def test_reported_flops_are_the_executed_ones(name: str) -> None:
    plan = preset_plan(name, MODEL, Workload((Grid(12, 14),), text=20, text_before=3))
    subject = subject_of(with_layers(plan, sampled_layers(plan, 5)))
    counts = []
    for name in (DENSE, PRUNED):
        counter = FlopCounterMode(display=False)
        with subject.switch(name), counter, sdpa_kernel(SDPBackend.MATH):
            subject.prefill()
        counts.append(counter.get_total_flops())
    found = bench_random(plan, Sizes(batch=2), QUICK, num_layers=5)
    assert counts == [pytest.approx(each, rel=0.01) for each in found.flops]


@pytest.mark.parametrize("name", PRESETS)
def test_the_flops_ratio_matches_flops_py(name: str) -> None:
    found = bench_random(plan_for(name), Sizes(visual=25, text=7), QUICK, num_layers=4)
    ran, workload = found.plan, Workload((Grid(5, 5),), text=7, text_before=2)
    assert ran.workload == workload and ran.model.shape.layers == 4
    expected = prefill_flops(ran) / dense_prefill_flops(ran.model.shape, workload)
    assert found.flops_ratio == expected
    assert found.over_bound == found.prefill.ratio.median / expected
    assert found.visual_kv == (
        dense_visual_kv_bytes(ran.model.shape, workload, 4),
        visual_kv_bytes(ran, 4),
    )
    assert found.planned_kv == found.visual_kv[1]
    dense_peak, pruned_peak = found.peak_memory
    assert 0 < pruned_peak < dense_peak


def test_rounds_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def measure(self: Bench, name: str, decode_steps: int) -> Sample:
        order.append(name)
        return Sample(float(len(order)), None)

    monkeypatch.setattr(Bench, "measure", measure)
    rounds = run_rounds(subject_of(plan_for()), replace(QUICK, runs=3, warmup=2))
    forth, back = [DENSE, PRUNED], [PRUNED, DENSE]
    assert order == [*forth, *back, *forth, *back, *forth]
    assert [each.prefill for each in rounds.samples[DENSE]] == [5.0, 8.0, 9.0]
    assert [each.prefill for each in rounds.samples[PRUNED]] == [6.0, 7.0, 10.0]
    assert rounds.decode(PRUNED) is None
    baselines = {"vtw": TokenWithdrawal(1)}
    order.clear()
    run_rounds(
        replace(subject_of(plan_for()), baselines=baselines), replace(QUICK, runs=2, warmup=0)
    )
    assert order == [DENSE, PRUNED, "vtw", "vtw", PRUNED, DENSE]


def test_ratios_are_medians_over_pairs() -> None:
    found = Compared.of([1.0, 10.0, 4.0], [0.5, 1.0, 3.0])
    assert found.dense.median == 4.0 and found.pruned.median == 1.0
    assert (found.ratio.low, found.ratio.median, found.ratio.high) == (0.3, 0.5, 0.625)


def state(model: Any) -> tuple[object, ...]:
    modules = list(model.modules())
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules]
    return [type(each) for each in modules], hooks, set(vars(model.base_model))


@pytest.mark.parametrize("fails", [False, True])
def test_a_benchmark_leaves_no_trace(
    mha: Subject, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    plan = mha.random_plan(3)
    tiny.logits(mha.model, tiny.batch([[1, *tiny.PICTURE, 3]]))  # transformers hooks its own tower
    before, threads = state(mha.model), torch.get_num_threads()
    options = replace(QUICK, threads=2)
    if fails:

        def fail(self: Bench) -> None:
            assert torch.get_num_threads() == 2
            raise ZeroDivisionError

        monkeypatch.setattr(Bench, "prefill", fail)
        with pytest.raises(ZeroDivisionError):
            bench_model(mha.model, plan, Sizes(), options)
    else:
        found = bench_model(mha.model, plan, Sizes(batch=2), options)
        assert found.threads == 2 and found.weights == "checkpoint"
    assert state(mha.model) == before and torch.get_num_threads() == threads


def test_a_real_model_is_timed_on_its_own_images(subject: Subject) -> None:
    plan = subject.random_plan(5)
    sizes = Sizes(batch=2, visual=2 * tiny.SIDE**2, text=11)
    found = bench_model(subject.model, plan, sizes, replace(QUICK, decode_steps=0))
    assert found.plan.workload.grids == (Grid(tiny.SIDE, tiny.SIDE),) * 2
    assert found.layers.used == (0, 1, 2, 3) and found.decode is None
    assert found.visual_kv[1] == found.planned_kv == 2 * visual_kv_bytes(found.plan, 4)
    with pytest.raises(
        ModelError, match="9 visual tokens were requested, but 1 of the model.s images have 16"
    ):
        bench_model(subject.model, plan, Sizes(visual=9), QUICK)


def test_a_plan_of_another_family_runs_on_a_substitute_model(mha: Subject) -> None:
    plan = mha.random_plan(5)
    plan = replace(plan, model=replace(plan.model, family="internvl"))
    found = bench_random(plan, Sizes(), QUICK, num_layers=2)
    assert found.stand_in and document(found)["stand_in"]
    assert not bench_random(plan_for(), Sizes(), QUICK).stand_in


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(500, dtype=torch.float32)
        del first
        third = torch.empty(250, dtype=torch.float32)
        return torch.cat([second, third])

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(6000, abs=128)
    assert peak_bytes(call, torch.device("meta")) is None


def test_one_run_has_no_spread() -> None:
    found = benching.bench_random(plan_for(), Sizes(), replace(QUICK, runs=1))
    ratio = found.prefill.ratio
    assert ratio.low == ratio.median == ratio.high > 0


def test_baselines_are_measured_at_the_plans_budget() -> None:
    plan = plan_for(workload=Workload((Grid(12, 14),), text=20, text_before=3))
    options = replace(QUICK, baselines=tuple(BASELINES), may_leave_out=True)
    found = bench_random(plan, Sizes(batch=2), options)
    runs = [name for name in BASELINES if name != "fastv"]  # half of its layers exceed the budget
    assert list(found.measured) == [DENSE, PRUNED, *runs]
    assert list(found.left_out) == ["fastv"] and "25.0 %" in found.left_out["fastv"]
    shape, workload = found.plan.model.shape, found.plan.workload
    for name, method in found.baselines.items():
        measured = found.measured[name]
        assert name == "masked" or found.visual_budget_of(name) <= visual_budget(plan)
        assert measured.visual_kv == found.planned_kv_of(name)
        assert found.flops_of(name) == 2 * method.prefill_flops(shape, workload)
        assert measured.prefill.dense == found.prefill.dense
        ideal = found.flops_of(name) / found.rates.flops
        assert found.prefill_bound_of(name) == ideal / measured.prefill.pruned.median
        assert measured.peak_memory > 0 and measured.decode.ratio.median > 0
    assert found.measured[DENSE].prefill.ratio.median == 1.0


def test_reported_flops_of_baselines_are_the_executed_ones() -> None:
    plan = plan_for(workload=Workload((Grid(12, 14),), text=20, text_before=3))
    plan = with_layers(plan, (0, 1, 2, 3, 4))
    model = random_model(plan.model.shape)
    methods = {name: solve_for(name, plan, 0.6) for name in BASELINES}
    prompt, where = made_up_prompt(model, plan, 2), grids_of(plan)
    subject = Bench(model, plan, prompt, where, methods)
    for name, method in methods.items():
        counter = FlopCounterMode(display=False)
        with subject.switch(name), counter, sdpa_kernel(SDPBackend.MATH):
            subject.prefill()
        expected = 2 * method.prefill_flops(plan.model.shape, plan.workload)
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.01), name


def test_a_requested_baseline_must_run() -> None:
    with pytest.raises(PlanError, match="fastv needs"):
        bench_random(plan_for("yopo-12"), Sizes(), replace(QUICK, baselines=("fastv",)))


def test_decode_steps_are_timed_at_several_contexts() -> None:
    options = replace(QUICK, baselines=("vtw", "masked"), contexts=(40, 64))
    found = bench_random(plan_for(), Sizes(), options)
    assert [each.context for each in found.contexts] == [40, 64]
    shape = found.plan.model.shape
    for at in found.contexts:
        assert list(at.decode) == [DENSE, PRUNED, "vtw"]
        assert at.plan.workload == Workload((Grid(3, 5),), at.context - 15, 2)
        assert all(each.pruned.median > 0 for each in at.decode.values())
        fixed = step_bytes(shape, at.plan.workload.text, 1, 4)
        dense = fixed + dense_visual_kv_bytes(shape, at.plan.workload, 4)
        kept = fixed + visual_kv_bytes(at.plan, 4)
        assert found.bytes_ratio_of(PRUNED, at.plan) == pytest.approx(kept / dense)
    with pytest.raises(PlanError, match="too short for the prompt of 24"):
        bench_random(plan_for(), Sizes(), replace(QUICK, contexts=(23,)))


def test_longer_prompts_reach_the_cache() -> None:
    subject = subject_of(plan_for()).lengthened(50)
    for name in (DENSE, PRUNED):
        with subject.switch(name):
            assert subject.prefill().get_seq_length() == 50


def test_a_decode_step_moves_weights_and_text_kv() -> None:
    model = random_model(SHAPE)
    layers = model.get_decoder().layers
    weights = sum(each.nbytes for each in layers.parameters() if each.dim() == 2)
    cached = 2 * 3 * 7 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 4
    assert step_bytes(SHAPE, 7, 3, 4) == weights + cached


def test_sampled_layers_of_a_refit_plan_keep_their_weights(mha: Subject) -> None:
    heads = tuple(range(mha.shape.heads))
    layers = (
        LayerPlan(heads, heads[:1], None, 20, qkv_rank=7),
        LayerPlan(heads, heads[:2], None, 20, qkv_rank=9, map_rank=2),
        LayerPlan(heads, heads, None, mha.shape.ffn),
        LayerPlan(heads, (), None, 0, map_rank=3),
    )
    plan = mha.random_plan(1, layers=layers, compensation="refit", baked=False)
    used = (1, 3)
    few = fitted(with_layers(plan, used))
    check_tensors(few)
    assert torch.equal(few.tensors.refit[1]["map_in"], plan.tensors.refit[3]["map_in"])
    assert torch.equal(few.tensors.neuron_order, plan.tensors.neuron_order[[1, 3]])


def test_layers_with_different_fits_are_sampled_separately(mha: Subject) -> None:
    """Of two sampled layers, one is of each kind; different heads do not make a kind."""
    heads = tuple(range(mha.shape.heads))
    plain, same = (LayerPlan(heads, heads[:count], None, 20) for count in (2, 3))
    mapped = LayerPlan(heads, heads[:2], None, 20, qkv_rank=5, map_rank=2)
    plan = mha.random_plan(
        1, layers=(plain, same, mapped, mapped), compensation="refit", baked=False
    )
    first, second = sampled_layers(plan, 2)
    assert first in (0, 1) and second in (2, 3)


needs_kernel = pytest.mark.skipif(
    gemm._kernel() is None, reason="this torch has no oneDNN product on plain weights"
)


def shown(found: Any) -> str:
    console = Console(width=120, record=True, file=StringIO())
    console.print(bench_report(found))
    return console.export_text()


@pytest.fixture
def other_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let weights of any size use oneDNN's products, and collect the sizes of those that do."""
    kernel, seen = gemm._kernel(), []

    def spy(inputs, weight, *rest):
        seen.append(weight.numel())
        return kernel(inputs, weight, *rest)

    monkeypatch.setattr(gemm, "MIN_WEIGHT", 1)
    monkeypatch.setattr(gemm, "_kernel", lambda: spy)
    return seen


@needs_kernel
def test_all_models_but_stock_run_on_the_same_kernels(other_kernel: list[int]) -> None:
    plan = plan_for(workload=Workload((Grid(12, 14),), text=20, text_before=3))
    subject = subject_of(plan)
    baselines = {"vtw": TokenWithdrawal(2), "downsample": Downsampling()}
    subject = replace(subject, baselines=baselines)
    assert subject.names == (DENSE, PRUNED, "vtw", "downsample", STOCK)
    linears = sum(type(each) is torch.nn.Linear for each in subject.model.get_decoder().modules())
    hooks = state(subject.model)
    for name in subject.names:
        other_kernel.clear()
        with subject.switch(name):
            subject.prefill()
        assert state(subject.model) == hooks
        assert other_kernel if name != STOCK else not other_kernel, name
        if name == DENSE:
            assert len(other_kernel) == linears
    subject.prefill()
    assert not other_kernel


@needs_kernel
def test_savings_of_another_kernel_are_reported_separately(
    other_kernel: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {DENSE: 10.0, PRUNED: 5.0, STOCK: 20.0}
    monkeypatch.setattr(Bench, "measure", lambda self, name, steps: Sample(times[name], 3.0))
    found = bench_random(plan_for(), Sizes(), QUICK)
    assert found.over_bound == 0.5 / found.flops_ratio
    assert found.over_bound_as_shipped == 0.25 / found.flops_ratio
    assert found.shipped.prefill.dense.median == 20.0 and list(found.measured) == [DENSE, PRUNED]
    shipped = document(found)["as_shipped"]
    assert shipped["other_kernels"] and shipped["prefill_ms"]["ratio"]["median"] == 0.25
    assert document(found)["prefill_ms"]["ratio"]["median"] == 0.5
    assert "as shipped: prefill" in shown(found) and "slower kernel" in shown(found)


def test_equal_kernels_need_only_one_figure() -> None:
    found = bench_random(plan_for(), Sizes(), QUICK)
    assert found.shipped is None and found.over_bound_as_shipped == found.over_bound
    assert "as shipped" not in shown(found)


# On a GPU prefills are replayed, of the dense model as well; here a tape stands in for graphs.


@pytest.fixture
def like_gpu(tape: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "may_replay", True)


@torch.no_grad()
def test_dense_in_the_pruned_runtime_is_the_stock_model(like_gpu: None) -> None:
    subject, found = subject_of(plan_for()), {}
    for name in (STOCK, DENSE, PRUNED):
        with subject.switch(name):
            found[name] = subject.prompt.prefill(subject.model).last_hidden_state
    torch.testing.assert_close(found[DENSE], found[STOCK])
    assert not torch.allclose(found[PRUNED], found[STOCK], atol=1e-2)
    assert not hasattr(subject.model.get_decoder(), "yopo")


def test_dense_and_pruned_are_both_replayed(like_gpu: None) -> None:
    subject = subject_of(plan_for())
    assert subject.names == (DENSE, PRUNED, STOCK)
    for name in subject.names:
        assert subject.measure(name, 1).is_replayed == (name != STOCK)
    found = bench_random(plan_for(), Sizes(), QUICK)
    assert found.cuda_graphs and document(found)["cuda_graphs"]
    assert found.shipped is not None and found.visual_kv[0] > found.visual_kv[1]
    said = shown(replace(found, device="cuda:0"))
    assert "CUDA graphs: prefills of dense and pruned are replayed" in said
    off = shown(replace(found, device="cuda:0", cuda_graphs=False))
    assert "CUDA graphs: not used, on either side" in off
    usual = bench_random(plan_for(), Sizes(), replace(QUICK, runs=1))
    assert "CUDA" not in shown(replace(usual, shipped=None))


def test_an_impossible_rate_is_reported_as_a_wrong_measurement() -> None:
    found = bench_random(plan_for(), Sizes(), QUICK)
    fast = found.flops_of(PRUNED) / found.prefill.pruned.median
    for rate, exceeded in ((2 * fast, False), (0.99 * fast, False), (0.5 * fast, True)):
        guess = replace(found, rates=Rates(max(rate, 1e-9), 1e30))
        assert ("pruned prefill" in guess.off) == exceeded
        assert ("measurement is unreliable: pruned prefill" in shown(guess)) == exceeded
    guess = replace(found, rates=Rates(1e30, 1.0))
    assert document(guess)["shares_above_the_bound"].keys() == {"dense decode", "pruned decode"}


def test_rates_come_from_the_best_round() -> None:
    assert best([Rates(1.0, 5.0), Rates(3.0, 2.0)]) == Rates(3.0, 5.0)
    model = random_model(SHAPE)
    rates = measure_rates(model.get_decoder().layers, 2, 30)
    assert rates.flops > 0 and rates.bytes > 0
