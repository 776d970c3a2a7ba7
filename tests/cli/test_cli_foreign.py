"""Quantized or pickled checkpoints, and those with custom code, are refused at once."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import FAST, Yopo

CALIBRATE = ("calibrate", "--data", "demo:calibration", *FAST)


@pytest.fixture
def foreign(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that tests may change."""
    return Path(shutil.copytree(model, tmp_path / "foreign"))


@pytest.fixture
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the test fail if weights are loaded or pairs are drawn."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("something that takes long was started")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", fail)
    monkeypatch.setattr("yopo.pipeline.opening.open_pairs", fail)


def edit_config(folder: Path, name: str = "config.json", **entries: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def commands(foreign: Path, plan: Path) -> list[tuple[object, ...]]:
    return [
        (*CALIBRATE, "--model", foreign),
        ("eval", plan, "--model", foreign, "--data", "demo:heldout"),
        ("apply", plan, "--model", foreign),
        ("bench", plan, "--model", foreign),
    ]


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "bitsandbytes"])
def test_quantized_sources_are_refused_early(
    yopo: Yopo, foreign: Path, plan: Path, method: str, no_model_is_loaded: None
) -> None:
    edit_config(foreign, quantization_config={"quant_method": method})
    for command in commands(foreign, plan):
        done = yopo(*command)
        assert done.is_sentence and f"its weights are quantized ({method})" in done.err
        assert "Use the unquantized checkpoint" in done.err


def test_an_empty_quantization_config_is_ignored(yopo: Yopo, foreign: Path, plan: Path) -> None:
    edit_config(foreign, quantization_config=None)
    assert yopo("apply", plan, "--model", foreign, "--dry-run").code == 0


def test_pickled_sources_are_refused_early(
    yopo: Yopo, foreign: Path, plan: Path, no_model_is_loaded: None
) -> None:
    (foreign / "model.safetensors").unlink()
    torch.save({}, foreign / "pytorch_model.bin")
    for command in commands(foreign, plan):
        done = yopo(*command)
        assert done.is_sentence and "neither model.safetensors nor" in done.err
        assert "only pytorch_model.bin" in done.err


@pytest.fixture
def hostile(foreign: Path) -> Path:
    """A model whose files name custom code everywhere; the code leaves a mark if it runs."""
    names = {"AutoConfig": "theirs.C", "AutoModel": "theirs.C", "AutoProcessor": "theirs.C"}
    names |= {"AutoModelForImageTextToText": "theirs.C", "AutoImageProcessor": "theirs.C"}
    names["AutoTokenizer"] = ["theirs.C", "theirs.C"]
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        edit_config(foreign, name, auto_map=names)
    code = f"import pathlib; pathlib.Path({str(foreign / 'ran')!r}).touch()\nclass C: pass\n"
    (foreign / "theirs.py").write_text(code)
    return foreign


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers every question on stdin with yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))


def test_custom_code_for_stock_classes_is_not_requested(
    yopo: Yopo, hostile: Path, yes: None
) -> None:
    done = yopo(*CALIBRATE, "--model", hostile, "--budget", 0.5)
    assert done.code == 0 and done.out == ""
    assert yopo("apply", "plan.yaml", "--model", hostile, "-o", "out", "--verify").code == 0
    assert (
        yopo("eval", "out", "--data", "demo:heldout", "--samples", 2, "--timing-runs", 0).code == 0
    )
    assert not (hostile / "ran").exists() and not Path("out/theirs.py").exists()


def test_required_custom_code_is_named_and_runs_only_if_trusted(
    yopo: Yopo, hostile: Path, yes: None
) -> None:
    edit_config(hostile, "processor_config.json", processor_class="TheirProcessor")
    done = yopo(*CALIBRATE, "--model", hostile)
    assert done.is_sentence and "custom code, which is not run" in done.err
    assert "--trust-remote-code" in done.err and not (hostile / "ran").exists()
    yopo(*CALIBRATE, "--model", hostile, "--trust-remote-code")
    assert (hostile / "ran").exists()


def test_a_model_of_another_class_is_refused_even_if_trusted(
    yopo: Yopo, hostile: Path, yes: None
) -> None:
    edit_config(hostile, model_type="their_own")
    done = yopo(*CALIBRATE, "--model", hostile, "--trust-remote-code")
    assert done.is_sentence and "their_own" in done.err and not (hostile / "ran").exists()
