"""The engine leaves out the work that a plan prunes: every linear layer's products are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/test_vllm.sh does it)")

import torch
from engines import answers, engine
from serving_models import KINDS, baked, pictures, prompt
from vllm import LLM
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from yopo.plans.flops import visual_flops_of_layer
from yopo.plans.grid import Grid, window_pairs
from yopo.plans.schema import LayerPlan, ModelShape, PruningPlan, Workload, full_layer
from yopo.serving.loading import read_baked_plan
from yopo.serving.vllm.source import SWITCH


@contextmanager
def counting(llm: LLM) -> Iterator[Counter[int]]:
    """Count the floating-point operations of every decoder layer's linear layers."""
    found: Counter[int] = Counter()
    layers = llm.apply_model(lambda model: model.get_language_model().model.layers)[0]
    owner = {id(part): index for index, layer in enumerate(layers) for part in layer.modules()}
    usual = UnquantizedLinearMethod.apply

    def apply(self: Any, layer: Any, inputs: torch.Tensor, bias: Any = None) -> torch.Tensor:
        outputs = usual(self, layer, inputs, bias)
        if id(layer) in owner:
            found[owner[id(layer)]] += 2 * inputs.numel() * outputs.shape[-1]
        return outputs

    UnquantizedLinearMethod.apply = apply
    try:
        yield found
    finally:
        UnquantizedLinearMethod.apply = usual


def predicted(layer: LayerPlan, shape: ModelShape, grid: Grid, text: int) -> int:
    """FLOPs of one layer's linear layers: visual tokens under the plan, text at full width."""
    prompt = Workload((grid,), text)
    visual = visual_flops_of_layer(layer, shape, prompt)
    visual -= 4 * window_pairs((grid,), None) * len(layer.attend_heads) * shape.head_dim
    one = visual_flops_of_layer(full_layer(shape), shape, Workload((Grid(1, 1),), text))
    return visual + text * (one - 4 * shape.heads * shape.head_dim)


def whole(plan: PruningPlan) -> list[LayerPlan]:
    """The layers of the dense model."""
    return [full_layer(plan.model.shape)] * plan.model.shape.layers


@pytest.mark.parametrize(("name", "grid"), [("llava", Grid(8, 8)), ("qwen2_vl", Grid(5, 6))])
def test_executed_flops_are_the_plans(
    name: str, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS[name]
    folder = baked(kind, tmp_path, (11, "refit"))
    plan = read_baked_plan(folder)
    shape = plan.model.shape
    question = (prompt(kind, "what color is it"), pictures(kind, 1))
    for switch, layers in (("dense", whole(plan)), (None, plan.layers)):
        monkeypatch.setenv(SWITCH, switch) if switch else monkeypatch.delenv(SWITCH)
        with engine(folder, enable_prefix_caching=False) as llm:
            length = len(llm.get_tokenizer().encode(question[0])) - 1 + grid.tokens
            with counting(llm) as found:
                answers(llm, [question], tokens=1)
        text = length - grid.tokens
        wanted = [predicted(layer, shape, grid, text) for layer in layers]
        assert [found[index] for index in range(shape.layers)] == wanted


def test_decode_steps_run_the_stock_layers(tmp_path: Path) -> None:
    kind = KINDS["llava"]
    folder = baked(kind, tmp_path, (11, "refit"))
    shape = read_baked_plan(folder).model.shape
    with engine(folder) as llm:
        question = [(prompt(kind, "is it"), pictures(kind, 1))]
        with counting(llm) as first:
            answers(llm, question, tokens=1)
        with counting(llm) as longer:
            answers(llm, question, tokens=5)
    dense = predicted(full_layer(shape), shape, Grid(1, 1), 0)
    for index in range(shape.layers):
        steps = longer[index] - 4 * dense
        assert 0 < steps < first[index]  # what remains is the part of the prompt not in the cache
