"""All methods meet a budget from below and execute the FLOPs that their closed forms predict."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from tiny import IMAGE, Subject
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from yopo.baselines.baseline import Baseline
from yopo.baselines.downsample import Downsampling
from yopo.baselines.fastv import FastV
from yopo.baselines.install import baseline
from yopo.baselines.random import RandomTokens
from yopo.baselines.registry import BASELINES, solve, solve_for, with_own_budget
from yopo.baselines.vtw import TokenWithdrawal
from yopo.bench.plans import preset_plan
from yopo.bench.random_model import WORKLOAD, published_model
from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_flops,
    dense_visual_kv_bytes,
    visual_budget,
)
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, Workload
from yopo.support.errors import PlanError

SIDE = 12
INPUTS = tiny.batch([[1, 5, 6, *[IMAGE] * SIDE**2, *range(7, 24)]], side=SIDE)
PROMPT = tiny.workload(side=SIDE, text=20, text_before=3)
SEVEN_B = published_model("llava-1.5-7b").shape
GROUPED = ModelShape(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, ffn=18944)
WIDE = Workload((Grid(24, 24), Grid(30, 17)), text=80, text_before=5)
BUDGETED = tuple(with_own_budget())


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def large(request: pytest.FixtureRequest) -> Subject:
    return tiny.make_subject(request.param, side=SIDE)


def executed(subject: Subject) -> int:
    """Return the matrix-product FLOPs of the text decoder in one forward."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        tiny.logits(subject.model, INPUTS)
    counts = counter.get_flop_counts()
    (decoder,) = (name for name in counts if name.endswith("model.language_model"))
    return sum(counts[decoder].values())


@pytest.mark.parametrize(
    "method",
    [
        TokenWithdrawal(0),
        TokenWithdrawal(3),
        FastV(2, share=0.3),
        FastV(2, share=0.0),
        Downsampling(scale=(0.5, 0.75)),
        RandomTokens(0, share=0.3),
        RandomTokens(2, share=0.3),
    ],
    ids=str,
)
def test_executed_flops_are_the_predicted_ones(large: Subject, method: Baseline) -> None:
    predicted = method.prefill_flops(large.shape, PROMPT)
    with baseline(large.model, method):
        assert executed(large) == pytest.approx(predicted, rel=0.01)
        with torch.no_grad():
            cache = large.model(**INPUTS, use_cache=True).past_key_values
    held = sum(layer.visual_bytes() for layer in cache.layers)
    assert held == method.visual_kv_bytes(large.shape, PROMPT, itemsize=4)
    assert predicted < dense_prefill_flops(large.shape, PROMPT)


def test_ranking_flops_are_counted_exactly(large: Subject) -> None:
    """Ranking costs one more query projection and one row of logits on top of the layers."""
    method, dense = FastV(2, share=0.3), executed(large)
    with baseline(large.model, method):
        saved = dense - executed(large)
    predicted = dense_prefill_flops(large.shape, PROMPT)
    assert saved == predicted - method.prefill_flops(large.shape, PROMPT)


def test_the_mask_simulation_executes_all_flops(large: Subject) -> None:
    plan = large.random_plan(3, workload=PROMPT)
    method, shape = solve_for("masked", plan), large.shape
    with baseline(large.model, method, plan):
        count = executed(large)
    dense = dense_prefill_flops(shape, PROMPT)
    assert count == pytest.approx(dense, rel=0.01)
    assert method.prefill_flops(shape, PROMPT) == dense
    assert method.reached(shape, PROMPT) == 1
    kept = dense_visual_kv_bytes(shape, PROMPT)
    assert method.visual_kv_bytes(shape, PROMPT) == kept


@pytest.mark.parametrize("budget", [0.12, 0.25, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("workload", [WORKLOAD, WIDE], ids=["square", "two sizes"])
@pytest.mark.parametrize("shape", [SEVEN_B, GROUPED], ids=["7b", "grouped"])
@pytest.mark.parametrize("name", BUDGETED)
def test_budgets_are_met_closely_from_below(
    name: str, shape: ModelShape, workload: Workload, budget: float
) -> None:
    found = solve(name, shape, workload, budget).reached(shape, workload)
    coarse = {"vtw": 1 / shape.layers, "downsample": 0.1 * budget, "grid": 0.1 * budget}
    assert budget - coarse.get(name, 0.005) <= found <= budget * (1 + 1e-6)


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_of_one_drops_nothing(name: str) -> None:
    method = solve(name, SEVEN_B, WIDE, 1.0)
    assert method.tokens(SEVEN_B, WIDE.grids) == (WIDE.visual,) * SEVEN_B.layers
    assert method.visual_flops(SEVEN_B, WIDE) == dense_visual_flops(SEVEN_B, WIDE)


def test_parameters_match_hand_arithmetic() -> None:
    """A quarter of 32 layers is 8; after two whole layers, 18.75 % of the budget is left for 30."""
    assert solve("vtw", SEVEN_B, WORKLOAD, 0.25).layers == 8
    method = solve("fastv", SEVEN_B, WORKLOAD, 0.25)
    assert method.layers == 2 and 0.19 < method.share < 0.21
    assert solve("downsample", SEVEN_B, WORKLOAD, 0.25).grid(Grid(24, 24)) == Grid(12, 12)
    count = method.kept(576)
    more = replace(method, share=(count + 1) / 576)
    assert more.reached(SEVEN_B, WORKLOAD) > 0.25


def test_fastv_keeps_at_least_two_whole_layers() -> None:
    with pytest.raises(PlanError, match=r"fastv needs at least 6\.2 %"):
        solve("fastv", SEVEN_B, WORKLOAD, 0.06)
    assert solve("vtw", SEVEN_B, WORKLOAD, 0.01).layers == 0


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5])
def test_a_budget_must_be_a_share(budget: float) -> None:
    with pytest.raises(PlanError, match="budget"):
        solve("vtw", SEVEN_B, WORKLOAD, budget)


@pytest.mark.parametrize("name", BASELINES)
def test_methods_follow_a_sample_of_layers(name: str) -> None:
    plan = preset_plan("yopo-25", published_model("llava-1.5-7b"), WORKLOAD)
    method = solve_for(name, plan)
    assert name == "masked" or method.reached(SEVEN_B, WORKLOAD) <= visual_budget(plan)
    few = method.on_layers((4, 12, 20, 28))
    layers = {"vtw": 1, "fastv": 1}
    assert few == (replace(method, layers=layers[name]) if name in layers else method)


def test_parameters_are_described_by_name() -> None:
    def called(name: str) -> str:
        return solve(name, SEVEN_B, WORKLOAD, 0.25).describe(SEVEN_B, WORKLOAD)

    assert called("vtw") == "K = 8 of 32 layers"
    assert called("fastv").startswith("K = 2 of 32 layers, R = 2")
    assert called("downsample") == "24x24 to 12x12"
    assert called("masked") == "the plan as masks, nothing is skipped"
