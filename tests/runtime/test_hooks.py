"""The pruned forward runs inside other libraries' wrappers, or they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tiny import PICTURE, Subject
from torch import nn
from transformers import LlavaForConditionalGeneration

import yopo
from yopo.checkpoint.bake import bake
from yopo.runtime.install import check_model, install, pruned
from yopo.support.errors import ModelError

INPUTS = tiny.batch([[1, 5, 6, *PICTURE, 7, 8]])
PIECES = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")


class Counting(ModelHook):
    """Counts the forwards that it wraps."""

    def __init__(self) -> None:
        self.entered = self.left = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self.entered += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.left += 1
        return output


@pytest.fixture
def case(mha: Subject) -> tuple:
    """A fresh model, a plan, and the logits of the dense and the pruned model."""
    plan = mha.random_plan(3)
    model = tiny.llava("mha")
    dense = tiny.logits(model, INPUTS)
    with pruned(model, plan):
        sparse = tiny.logits(model, INPUTS)
    assert not torch.equal(dense, sparse)
    return model, plan, dense, sparse


def dispatched(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    return accelerate.dispatch_model(model, dict.fromkeys(PIECES, "cpu"), force_hooks=True)


def test_a_dispatched_model_is_pruned_and_restored(case: tuple) -> None:
    model, plan, dense, sparse = case
    decoder = dispatched(model).get_decoder()
    before = {name: vars(decoder).get(name) for name in ("forward", "_old_forward", "_hf_hook")}
    assert all(before.values())
    with pruned(model, plan):
        assert torch.equal(tiny.logits(model, INPUTS), sparse)
        said = model.generate(**INPUTS, max_new_tokens=3, do_sample=False)
    assert {name: vars(decoder).get(name) for name in before} == before
    assert torch.equal(tiny.logits(model, INPUTS), dense)
    remove_hook_from_module(model, recurse=True)
    with pruned(model, plan):  # accelerate leaves its own forward on the model
        assert torch.equal(tiny.logits(model, INPUTS), sparse)
        assert torch.equal(model.generate(**INPUTS, max_new_tokens=3, do_sample=False), said)
    assert torch.equal(tiny.logits(model, INPUTS), dense)


def test_hooks_may_come_and_go_while_pruned(case: tuple) -> None:
    model, plan, dense, sparse = case
    decoder, hook = model.get_decoder(), Counting()
    with pruned(model, plan):
        add_hook_to_module(decoder, hook)
        assert torch.equal(tiny.logits(model, INPUTS), sparse)
    assert torch.equal(tiny.logits(model, INPUTS), dense)
    assert (hook.entered, hook.left) == (2, 2)
    with pruned(model, plan):
        assert torch.equal(tiny.logits(model, INPUTS), sparse)
        remove_hook_from_module(decoder)
        assert torch.equal(tiny.logits(model, INPUTS), sparse)
    assert torch.equal(tiny.logits(model, INPUTS), dense)
    assert (hook.entered, hook.left) == (3, 3)


def test_a_checkpoint_is_loaded_under_a_device_map(tmp_path: Path, mha: Subject) -> None:
    plan = mha.random_plan(3, baked=False, compensation="none")
    source, path = tmp_path / "source", tmp_path / "baked"
    mha.model.save_pretrained(source)
    bake(plan, source, path)
    expected = tiny.logits(yopo.load(path), INPUTS)
    places = dict.fromkeys(PIECES, "cpu") | {"model.vision_tower": "disk"}
    model = yopo.load(path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert "_old_forward" in vars(model.get_decoder())
    assert torch.equal(tiny.logits(model, INPUTS), expected)
    assert not torch.equal(tiny.logits(mha.model, INPUTS), expected)
    places["model.language_model"] = "disk"
    model = yopo.load(path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert model.get_decoder().layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(tiny.logits(model, INPUTS), expected)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_weights_that_are_offloaded_afterwards_are_fetched(
    case: tuple, kind: str, tmp_path: Path
) -> None:
    model, plan, _, sparse = case
    install(model, plan)
    said = model.generate(**INPUTS, max_new_tokens=3, do_sample=False)
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert model.get_decoder().layers[0].mlp.up_proj.weight.is_meta
    check_model(model, plan, check=True)
    assert torch.equal(tiny.logits(model, INPUTS), sparse)
    assert torch.equal(model.generate(**INPUTS, max_new_tokens=3, do_sample=False), said)


def test_weights_on_no_device_are_refused(case: tuple) -> None:
    model, plan, *_ = case
    install(model, plan)
    for layer in model.get_decoder().layers:
        layer.self_attn.k_proj.to("meta")
    keys = [layer.key for layer in model.get_decoder().yopo.visual if hasattr(layer, "key")]
    with pytest.raises(ModelError, match=r"weight of a Linear is on the meta device"):
        keys[0].matrix()


def wrapped(forward: Any) -> Any:
    """Wrap a forward as some library might."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return run


@pytest.mark.parametrize("how", ["wrapped", "compiled"])
def test_a_forward_that_hides_the_pruned_one_is_refused(case: tuple, how: str) -> None:
    model, plan, dense, _ = case
    decoder = model.get_decoder()
    before = (type(decoder), sorted(vars(model)), len(model.base_model._forward_pre_hooks))
    stock = decoder.forward
    decoder.forward = wrapped(stock) if how == "wrapped" else torch.compile(stock, backend="eager")
    with pytest.raises(ModelError, match="forward of the LlamaModel was replaced"):
        with pruned(model, plan):
            pass
    del decoder.forward
    assert not hasattr(decoder, "yopo")
    assert before == (type(decoder), sorted(vars(model)), len(model.base_model._forward_pre_hooks))
    assert torch.equal(tiny.logits(model, INPUTS), dense)


def test_a_forward_that_is_wrapped_while_pruned_is_pruned_and_then_dense(case: tuple) -> None:
    model, plan, dense, sparse = case
    decoder = model.get_decoder()
    with pruned(model, plan):
        decoder.forward = wrapped(decoder.forward)
        assert torch.equal(tiny.logits(model, INPUTS), sparse)
    assert torch.equal(tiny.logits(model, INPUTS), dense)


def test_a_forward_that_bypasses_the_pruned_one_is_an_error(case: tuple) -> None:
    model, plan, dense, sparse = case
    decoder = model.get_decoder()
    stock = decoder.forward
    with pruned(model, plan):
        decoder.forward = stock
        with pytest.raises(ModelError, match="was not reached"):
            tiny.logits(model, INPUTS)
        text = tiny.batch([[1, 2, 3]])
        assert tiny.logits(model, text).isfinite().all()  # nothing visual: nothing to prune
        del decoder.forward
        assert torch.equal(tiny.logits(model, INPUTS), sparse)
    assert torch.equal(tiny.logits(model, INPUTS), dense)


def test_a_compiled_decoder_can_be_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo traces and runs the code as written; guards see the same for every backend."""
    monkeypatch.setitem(tiny._COMMON, "num_hidden_layers", 1)  # tracing takes seconds per layer
    subject = tiny.make_subject("mha")
    model, plan = subject.model, subject.random_plan(3)
    dense = tiny.logits(model, INPUTS)
    with pruned(model, plan):
        sparse = tiny.logits(model, INPUTS)
    assert not torch.allclose(dense, sparse, atol=1e-2)
    model.get_decoder().compile(backend="eager")
    assert torch.allclose(tiny.logits(model, INPUTS), dense, atol=1e-5)
    with pruned(model, plan):
        assert torch.allclose(tiny.logits(model, INPUTS), sparse, atol=1e-5)


def test_autocast_is_close_to_the_models_own_precision(case: tuple) -> None:
    model, plan, _, sparse = case
    with pruned(model, plan), torch.autocast("cpu", torch.bfloat16):
        found = tiny.logits(model, INPUTS)
    assert found.isfinite().all()
    error = (found.float() - sparse)[tiny.real_text(INPUTS)].norm()
    assert error < 0.1 * sparse[tiny.real_text(INPUTS)].norm()
