"""Each stage of a calibration, an evaluation and a benchmark that runs out of memory says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from yopo.bench import run as bench_run
from yopo.calibration.observers import Observer
from yopo.evaluation import evaluate as evaluate_module
from yopo.evaluation import fidelity
from yopo.fitting import profile as profile_module
from yopo.fitting import refit as refit_module
from yopo.pipeline import model_handle
from yopo.pipeline.commands import calibrate, evaluate
from yopo.pipeline.options import RunOptions
from yopo.planning.request import BudgetRequest
from yopo.plans.schema import PruningPlan
from yopo.support.errors import YopoError

OPTIONS = RunOptions(samples=32, batch_size=4, max_new_tokens=2)
FITTED = BudgetRequest(0.2, compensation="refit")


def fail(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def out_of_memory(call: Callable[[], object]) -> YopoError:
    with pytest.raises(YopoError) as caught:
        call()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    return caught.value


FORWARD = "Use a smaller --batch-size, --offload always, "


@pytest.mark.parametrize(
    ("place", "name", "sentence", "remedy"),
    [
        (model_handle, "load_dense", "loading the weights.", "Use --offload always (yopo"),
        (Observer, "on_attention", "measuring statistics, 4 pairs per batch.", FORWARD),
        (
            fidelity,
            "generate_answers",
            "recording the dense model's answers to 8 pairs, 4 per batch.",
            f"{FORWARD}--dtype bfloat16, fewer --max-new-tokens, or fewer --measure-pairs.",
        ),
        (
            fidelity,
            "_fidelity_of",
            "comparing a plan with the dense model, 4 pairs per batch.",
            f"{FORWARD}or --dtype bfloat16.",
        ),
        (profile_module, "_profile_layer", "the profile, with the states of 24 pairs.", "-pairs"),
        (refit_module.LayerFit, "ffn", "the fit, with the states of 24 pairs.", "--fit-pairs"),
    ],
)
def test_calibration(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, sentence: str, remedy: str
) -> None:
    monkeypatch.setattr(place, name, fail)
    compares = name in ("generate_answers", "_fidelity_of")
    request = BudgetRequest(0.2, template="reader", compensation="none") if compares else FITTED
    error = out_of_memory(lambda: calibrate("llava-tiny", request, options=OPTIONS))
    assert error.message == f"Out of memory in {sentence}"
    assert error.remedy is not None and remedy in error.remedy


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    request = BudgetRequest(0.2, template="reader", compensation="none")
    return calibrate("llava-tiny", request, options=OPTIONS).plan


@pytest.mark.parametrize(
    ("place", "name", "sentence", "option"),
    [
        (fidelity, "answer_log_probs", "recording the dense model's answers, 4", "--max-new"),
        (fidelity, "_fidelity_of", "comparing the pruned model with the dense one, 4", "--dtype"),
        (evaluate_module, "time_prefill", "timing prefills, 4 pairs per", "--timing-runs 0"),
        (evaluate_module, "examples_of", "looking where the text looks, one", "--examples 0"),
    ],
)
def test_evaluation(
    monkeypatch: pytest.MonkeyPatch,
    plan: PruningPlan,
    place: Any,
    name: str,
    sentence: str,
    option: str,
) -> None:
    monkeypatch.setattr(place, name, fail)
    error = out_of_memory(lambda: evaluate(plan, options=OPTIONS, timing_runs=1, examples=1))
    assert error.message.startswith(f"Out of memory in {sentence}")
    assert error.remedy is not None and option in error.remedy
    assert "--offload always" in error.remedy


def test_benchmark(monkeypatch: pytest.MonkeyPatch, plan: PruningPlan) -> None:
    monkeypatch.setattr(bench_run, "run_rounds", fail)
    sizes, options = bench_run.Sizes(batch=2, text=16), bench_run.BenchOptions(runs=1)
    error = out_of_memory(lambda: bench_run.bench_random(plan, sizes, options))
    length = plan.workload.visual + 16
    assert error.message == f"Out of memory in timing 2 prompts of {length} tokens."
    assert error.remedy == (
        "Use a smaller --batch, --dtype bfloat16, fewer --layers, or fewer --visual-tokens."
    )
