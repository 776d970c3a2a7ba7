"""A baked directory: dense in stock transformers, pruned in yopo and under trust_remote_code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny import PICTURE, Subject
from transformers import AutoModelForImageTextToText

import yopo
from yopo.checkpoint.bake import bake
from yopo.errors import CheckpointError, ModelError
from yopo.families.registry import resolve
from yopo.runtime.install import pruned
from yopo.runtime.parts import Part
from yopo.serving import load_dense, torch_dtype

ROWS = [[1, 5, 6, *PICTURE, 7, 8, 9, 10], [1, *PICTURE, 3, 4, *PICTURE, 9]]


@pytest.fixture(scope="module", params=["hub layout", "module names"])
def baked(request: pytest.FixtureRequest, subject: Subject, tmp_path_factory):
    """(baked directory, plan, tensors, subject) in both key layouts."""
    folder = tmp_path_factory.mktemp("baked")
    is_hub = request.param == "hub layout"
    subject.model.save_pretrained(folder / "source", save_original_format=is_hub)
    plan, tensors = subject.random_plan(7, compensation="mean", baked=False)
    bake(plan, tensors, folder / "source", folder / "out")
    return folder / "out", plan, tensors, subject


def check_pruned(found: torch.nn.Module, plan, tensors, subject: Subject) -> None:
    inputs = tiny.batch(ROWS)
    with pruned(subject.model, plan, tensors):
        usual = tiny.logits(subject.model, inputs)
    with pruned(subject.oracle, plan, tensors, check=False):
        oracle = tiny.logits(subject.oracle, inputs)
    where = tiny.real_text(inputs)
    tiny.assert_close(tiny.logits(found, inputs), usual, oracle, where)
    assert not torch.allclose(usual[where], tiny.logits(subject.model, inputs)[where], atol=1e-3)


def test_load_gives_the_pruned_model(baked) -> None:
    path, plan, tensors, subject = baked
    check_pruned(yopo.load(path), plan, tensors, subject)


def test_remote_code_gives_the_pruned_model_and_no_random_weight(baked) -> None:
    path, plan, tensors, subject = baked
    model, report = AutoModelForImageTextToText.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    check_pruned(model, plan, tensors, subject)


def test_stock_load_is_the_original_model(baked) -> None:
    path, _, _, subject = baked
    inputs = tiny.batch(ROWS)
    stock = AutoModelForImageTextToText.from_pretrained(path)
    assert not hasattr(stock.get_decoder(), "yopo")
    usual, oracle = (tiny.logits(each, inputs) for each in (subject.model, subject.oracle))
    tiny.assert_close(tiny.logits(stock, inputs), usual, oracle, tiny.real(inputs))


def test_baked_parts_are_views_not_copies(baked) -> None:
    path, _, _, subject = baked
    if subject.shape.group > 1:
        pytest.skip("ragged groups of query heads are gathered")
    state = yopo.load(path).get_decoder().yopo
    held = [name for name, _ in state.named_buffers()]
    assert held and all(name.endswith("mean") for name in held)
    for layer in state.visual:
        for part in (each for each in layer.children() if isinstance(each, Part)):
            own = part.source.weight.untyped_storage().data_ptr()
            assert part.matrix()[0].untyped_storage().data_ptr() == own


def test_loading_needs_no_prompt_and_no_yopo_when_dense(baked) -> None:
    path, *_ = baked
    code = (
        "import sys; from transformers import AutoModelForImageTextToText as A;"
        f"model = A.from_pretrained({str(path)!r});"
        "assert not any(name.split('.')[0] == 'yopo' for name in sys.modules); print('dense')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert run.returncode == 0 and run.stdout.strip() == "dense", run.stderr


def test_a_missing_weight_is_an_error_not_a_random_tensor(baked, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path, *_ = baked
    broken = shutil.copytree(path, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    victim = next(name for name in weights if "down_proj" in name)
    del weights[victim]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        yopo.load(broken)


def test_other_weights_than_the_plans_are_refused(baked, tmp_path: Path) -> None:
    path, _, _, subject = baked
    other = shutil.copytree(path, tmp_path / "other")
    stranger = tiny.llava("mha")
    if subject.shape != tiny.make_subject("mha").shape:
        pytest.skip("one shape is enough")
    stranger.save_pretrained(tmp_path / "stranger")
    shutil.copy(tmp_path / "stranger" / "model.safetensors", other / "model.safetensors")
    with pytest.raises(ModelError, match="fingerprint"):
        yopo.load(other)


def test_a_dense_directory_is_not_loaded_as_pruned(mha: Subject, tmp_path: Path) -> None:
    mha.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no yopo_plan\.yaml"):
        yopo.load(tmp_path)


def test_unreachable_and_unsupported_models_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hub cannot be"):
        load_dense(replace(resolve("llava-1.5-7b"), location="nobody/nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="'bert' are not supported"):
        load_dense(resolve(str(tmp_path)))
    with pytest.raises(ModelError, match="Unknown dtype 'float33'"):
        torch_dtype("float33")
