"""A refit improves plans on the trained demo model, from pairs to answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from transformers import PreTrainedModel

from yopo.calibration.measure import measure
from yopo.calibration.statistics import Statistics
from yopo.data.prompts import batches, encode, load_processor
from yopo.data.sources import open_pairs
from yopo.evaluation.fidelity import Recorded, compare, record_dense
from yopo.fitting.fitter import Fitter
from yopo.models.registry import resolve
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest, PaperRequest
from yopo.plans.checks import check_tensors
from yopo.plans.file import to_yaml
from yopo.plans.flops import visual_budget
from yopo.plans.schema import LayerPlan, PruningPlan
from yopo.plans.storage import to_bytes
from yopo.runtime.install import pruned
from yopo.serving.loading import load_dense

PAIRS = 24


@dataclass(frozen=True)
class Demo:
    """The demo model with everything that a planner needs, on the same few pairs."""

    model: PreTrainedModel
    statistics: Statistics
    fitter: Fitter
    records: list[Recorded]

    def kl(self, plan: PruningPlan) -> float:
        with pruned(self.model, plan):
            return compare(self.model, self.records).kl

    def plan(self, layers: tuple[LayerPlan, ...], compensation: str) -> PruningPlan:
        """Make a plan with these layers, fitted if it needs to be."""
        made, _ = make_plan(self.statistics, PaperRequest(preset="yopo-25"))
        plan = replace(made, layers=layers, compensation=compensation)
        return self.fitter.fit([plan])[0] if compensation == "refit" else plan


@pytest.fixture(scope="module")
def demo() -> Demo:
    source = resolve("llava-tiny")
    processor, model = load_processor(source.location), load_dense(source)
    pairs = list(open_pairs("demo:calibration", samples=PAIRS, seed=0))
    statistics = measure(model, processor, pairs, name=source.name, batch_size=PAIRS)
    records = record_dense(model, processor, pairs, batch_size=PAIRS, max_new_tokens=6)
    calls = []

    def encoded() -> list:
        calls.append(1)
        assert len(calls) == 1, "prompts are encoded once"
        token = model.config.image_token_id
        options = {"image_token_id": token, "device": "cpu", "dtype": model.dtype}
        return [encode(processor, group, **options) for group in batches(pairs, PAIRS // 2)]

    return Demo(model, statistics, Fitter(model, encoded), records)


def test_a_refit_lowers_the_kl(demo: Demo) -> None:
    """Half of the heads attend and an eighth of the neurons is used; then maps replace them."""
    shape = demo.statistics.model.shape
    heads = tuple(range(shape.heads))
    layer = LayerPlan(heads, heads[::2], None, shape.ffn // 8)
    kl = {
        kind: demo.kl(demo.plan((layer,) * shape.layers, kind))
        for kind in ("none", "mean", "refit")
    }
    mapped = replace(layer, map_rank=shape.hidden // 8)
    kl["map"] = demo.kl(demo.plan((mapped,) * shape.layers, "refit"))
    narrow = replace(mapped, qkv_rank=shape.hidden // 2)
    kl["rank"] = demo.kl(demo.plan((narrow,) * shape.layers, "refit"))
    print(", ".join(f"logit KL {value:.3g} with {kind}" for kind, value in kl.items()))
    assert kl["refit"] < 0.2 * min(kl["none"], kl["mean"])
    assert kl["map"] < 0.8 * kl["refit"]
    assert kl["rank"] < 0.2 * min(kl["none"], kl["mean"])


def test_a_preset_can_be_refitted(demo: Demo) -> None:
    request = PaperRequest(preset="yopo-25", compensation="refit")
    plan, candidates = make_plan(demo.statistics, request, None, demo.fitter)
    bare, _ = make_plan(demo.statistics, PaperRequest(preset="yopo-25"))
    assert plan.compensation == "refit" and plan.layers == bare.layers and candidates == []
    check_tensors(plan)
    fitted = plan.tensors.refit
    assert fitted and set(fitted) <= set(range(plan.visual_depth)) and not bare.tensors.refit
    assert demo.kl(plan) < demo.kl(bare)


def test_a_budget_can_be_met_with_a_refit(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yopo.planning.weightings.VISUAL_WEIGHTS", (1.0, 10.0))
    monkeypatch.setattr("yopo.planning.allocations.GENERATIONS", 1)
    request = BudgetRequest(0.2, compensation="refit")
    plan, found = make_plan(demo.statistics, request, demo.kl, demo.fitter)
    assert 0.15 < plan.budget.reached == visual_budget(plan) <= 0.2
    assert found[0].kl == demo.kl(plan) == min(each.kl for each in found)
    assert any(layer.is_fitted for layer in plan.layers)
    other = BudgetRequest(0.2, compensation="mean", template="reader-heads")
    usual, others = make_plan(demo.statistics, other, demo.kl)
    assert found[0].kl < others[0].kl and usual.compensation == "mean"
    again, _ = make_plan(demo.statistics, request, demo.kl, demo.fitter)
    assert to_yaml(again) == to_yaml(plan) and to_bytes(again.tensors) == to_bytes(plan.tensors)
