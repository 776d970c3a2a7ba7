"""What is served: the first plan, another one, the dense model; what is refused, and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/test_vllm.sh does it)")

from engines import Prompt, Reference, answers, engine
from serving_models import KINDS, baked, build, pictures, prompt, servable_plan

import yopo
from yopo.checkpoint.bake import bake
from yopo.serving.loading import read_baked_plan
from yopo.serving.vllm.source import SWITCH
from yopo.support.errors import ModelError, PlanError

KIND = KINDS["llava"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with two plans."""
    return baked(KIND, tmp_path_factory.mktemp("two"), (1, "refit"), (4, "refit"))


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """One prompt with an image."""
    return [(prompt(KIND, "what color is it"), pictures(KIND, 1))]


def test_another_budget(
    folder: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [folder / "yopo_plan.yaml", folder / "yopo_plan-1.yaml"]
    budgets = [yopo.read_plan(plan).budget.reached for plan in plans]
    smallest = min(budgets)
    wanted = Reference.of(folder, prompts, budget=smallest)
    other = Reference.of(folder, prompts, budget=max(budgets))
    assert wanted.distance(other) > 1000 * wanted.rounding
    with engine(folder, hf_overrides={"yopo": {"budget": smallest}}) as llm:
        wanted.check(answers(llm, prompts))
    monkeypatch.setenv(SWITCH, str(smallest))
    with engine(folder) as llm:
        wanted.check(answers(llm, prompts))


def test_the_dense_model(
    folder: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = Reference.of(folder, prompts, dense=True)
    with engine(folder, hf_overrides={"yopo": None}) as llm:
        dense.check(answers(llm, prompts))
    monkeypatch.setenv(SWITCH, "dense")
    with engine(folder) as llm:
        dense.check(answers(llm, prompts))


def test_a_checkpoint_without_a_plan_is_served_as_ever(folder: Path, prompts: list[Prompt]) -> None:
    source = folder.parent / "dense"
    with engine(source) as llm:
        Reference.of(source, prompts, dense=True).check(answers(llm, prompts))


def test_without_the_plugin_the_dense_model_is_served(
    folder: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    prompts[0][1][0].save(tmp_path / "image.png")
    code = (
        "import json, sys; from PIL import Image; from engines import answers, engine\n"
        f"image = Image.open({str(tmp_path / 'image.png')!r}).convert('RGB')\n"
        f"with engine({str(folder)!r}) as llm:\n"
        f"    tokens, scores = answers(llm, [({prompts[0][0]!r}, [image])])[0]\n"
        "print(json.dumps([tokens, scores.tolist()]))"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_PLUGINS": "none", "PYTHONPATH": paths},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    tokens, scores = json.loads(run.stdout.strip().splitlines()[-1])
    import torch

    dense = Reference.of(folder, prompts, dense=True)
    dense.check([(tokens, torch.tensor(scores, dtype=torch.float64))])


def test_a_calibrated_plan_is_served(tmp_path: Path, prompts: list[Prompt]) -> None:
    build(KIND, tmp_path / "dense")
    found = yopo.calibrate(
        str(tmp_path / "dense"),
        yopo.BudgetRequest(0.2, engine="vllm"),
        options=yopo.RunOptions(data="demo:calibration", samples=24),
    )
    assert found.plan.compensation == "refit"
    yopo.apply(found.plan, output=tmp_path / "baked")
    pruned = Reference.of(tmp_path / "baked", prompts)
    dense = Reference.of(tmp_path / "dense", prompts, dense=True)
    assert pruned.distance(dense) > 1000 * pruned.rounding
    with engine(tmp_path / "baked") as llm:
        pruned.check(answers(llm, prompts))


def unservable(folder: Path, **changes: object) -> Path:
    """A checkpoint whose second layer has something that an engine cannot run."""
    model = build(KIND, folder / "dense")
    plan = servable_plan(model, 1, "none")
    second = replace(plan.layers[1], **changes)
    plan = plan.with_layers([plan.layers[0], second, *plan.layers[2:]])
    bake(plan, folder / "dense", folder / "baked")
    return folder / "baked"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"read_heads": (0, 2), "attend_heads": ()}, "in layer 1 2 of 4 heads may not read"),
        ({"read_heads": (), "attend_heads": ()}, "in layer 1 no head reads visual tokens"),
        ({"attend_heads": (0, 1, 2, 3), "radius": 2}, "only to neighbors"),
        ({"value_bits": 8}, "stored in few bits"),
    ],
)
def test_what_an_engine_cannot_run_is_refused(
    changes: dict[str, object], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unservable(tmp_path, **changes)
    with pytest.raises(PlanError, match=sentence), engine(folder):
        pass
    monkeypatch.setenv(SWITCH, "dense")
    prompts = [(prompt(KIND, "is it"), pictures(KIND, 1))]
    with engine(folder) as llm:
        answers(llm, prompts)


def test_settings_that_do_not_go_with_a_plan_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="LoRA"), engine(folder, enable_lora=True):
        pass


def test_a_wrong_budget_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "much")
    with pytest.raises(yopo.YopoError, match="expected 'dense' or a visual budget"), engine(folder):
        pass
    monkeypatch.setenv(SWITCH, "0.0001")
    with pytest.raises(yopo.YopoError, match="no plan within"), engine(folder):
        pass
    assert read_baked_plan(folder).baked
