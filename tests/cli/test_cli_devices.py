"""--device-map, and whole commands on a decoder that is spread over two devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command_line import FAST, Yopo
from devices import pretended, spread
from transformers import AutoProcessor

from yopo.evaluation.evaluate import Evaluation
from yopo.models.registry import resolve
from yopo.pipeline.commands import Calibrated, calibrate, evaluate
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.request import plan_request
from yopo.plans.file import to_yaml
from yopo.serving.loading import load_dense

OPTIONS = RunOptions(data="demo:calibration", samples=32, batch_size=16, max_new_tokens=2)
FIT = FitOptions(measure_pairs=8, fit_pairs=8)
PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")


@pytest.fixture
def one_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One allocation instead of a dozen."""
    tiny.try_few_plans(monkeypatch)


def made(model: Any, path: Path) -> tuple[Calibrated, Evaluation]:
    """A calibration and its evaluation on other pairs."""
    how = {"processor": AutoProcessor.from_pretrained(path)}
    request = plan_request(budget=0.3, compensation="refit")
    found = calibrate(model, request, options=OPTIONS, fit_options=FIT, **how)
    other = RunOptions(data="demo:heldout", samples=8, max_new_tokens=2)
    return found, evaluate(found.plan, options=other, model=model, timing_runs=0, **how)


@pytest.fixture
def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretended devices have neither memory nor a speed that could be asked for."""
    monkeypatch.setattr("yopo.pipeline.session.check_calibration", lambda *_: None)
    monkeypatch.setattr("yopo.pipeline.commands.check_evaluation", lambda *_: None)


@pytest.mark.usefixtures("one_allocation", "no_estimate")
def test_a_spread_model_is_calibrated_and_evaluated_as_on_one_device(model: Path) -> None:
    dense = load_dense(resolve(str(model)))
    with pretended():
        (one, first), (two, second) = (
            made(spread(dense, *places), model) for places in ((0,), (0, 1))
        )
    assert to_yaml(one.plan) == to_yaml(two.plan)
    assert one.plan.tensors.refit.keys() == two.plan.tensors.refit.keys() != set()
    for layer, weights in one.plan.tensors.refit.items():
        for name, each in weights.items():
            assert torch.equal(each, two.plan.tensors.refit[layer][name])
    assert first.to_dict() == second.to_dict()


def calibrated(yopo: Yopo, model: Path, *more: object) -> str:
    """The plan that a calibration writes."""
    data = ("--model", model, "--data", "demo:calibration", *FAST)
    done = yopo("-q", "calibrate", *data, "--preset", "yopo-25", "-o", "plan.yaml", *more)
    assert done.code == 0, done.err
    text = Path("plan.yaml").read_text()
    Path("plan.yaml").unlink()
    return text


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_device_map_is_a_name_or_a_file(yopo: Yopo, model: Path, kind: str) -> None:
    usual = calibrated(yopo, model, "--device", "cpu")
    assert calibrated(yopo, model, "--device-map", "auto") == usual
    places = dict.fromkeys(PARTS, "cpu")
    text = json.dumps(places) if kind == "json" else "\n".join(f"{name}: cpu" for name in places)
    Path(f"places.{kind}").write_text(text)
    assert calibrated(yopo, model, "--device-map", f"places.{kind}") == usual


def test_bench_and_eval_take_a_device_map(yopo: Yopo, model: Path, plan: Path) -> None:
    place = ("--device-map", "auto")
    done = yopo("bench", plan, "--model", model, *place, "--runs", 1, "--json")
    assert done.code == 0 and json.loads(done.out)["device"] == "cpu", done.err
    data = ("--data", "demo:heldout", "--samples", 4, "--timing-runs", 0)
    done = yopo("eval", plan, "--model", model, *data, *place, "--json")
    assert done.code == 0, done.err


def test_a_bad_device_map_is_one_sentence(yopo: Yopo, model: Path, plan: Path) -> None:
    def refused(text: str, *more: object) -> str:
        Path("places.yaml").write_text(text)
        data = ("--model", model, "--data", "demo:calibration", *FAST)
        done = yopo("calibrate", *data, "--device-map", "places.yaml", *more)
        assert done.is_sentence, done
        return done.err

    assert "places.yaml:1: lm_head must be text or a whole number" in refused("lm_head: [1]")
    assert "names device 'gpu'" in refused("lm_head: gpu")
    data = ("--model", model, "--data", "demo:calibration", *FAST)
    done = yopo("calibrate", *data, "--device-map", "autos")
    assert done.is_sentence and "autos" in done.err
    done = yopo("eval", plan, "--device", "cpu", "--device-map", "auto")
    assert done.code == 2 and "exclude one another" in done.err
    done = yopo("bench", plan, "--random-weights", "--device-map", "auto")
    assert done.code == 2 and "needs a checkpoint" in done.err
