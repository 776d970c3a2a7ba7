"""A pruned model trains: visual tokens see steps, checkpointing, dropout and fitted weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny import PICTURE, Subject
from torch import nn
from transformers import DynamicCache, Phi3Config

import yopo
from yopo.models import internvl, llava
from yopo.plans.schema import LayerPlan, PruningPlan
from yopo.runtime.install import fitted_parameters, install, pruned, uninstall
from yopo.support.errors import ModelError

INPUTS = tiny.batch([[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, *PICTURE, 9]])
KINDS = ("none", "mean", "refit")


def loss(model: nn.Module) -> torch.Tensor:
    labels = INPUTS["input_ids"].masked_fill(~tiny.real_text(INPUTS), -100)
    return model(**INPUTS, labels=labels, use_cache=False).loss


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        value = loss(model.train())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    model.eval()
    return losses


def halved(subject: Subject, compensation: str, **fixed: Any) -> PruningPlan:
    """Halve everything, ragged under GQA, so that every layer has every kind of visual module."""
    shape = subject.shape
    heads = tuple(range(0, shape.heads, 2)) + ((shape.heads - 1,) if shape.heads % 2 == 0 else ())
    more = {"qkv_rank": 8, "map_rank": 4} if compensation == "refit" else {}
    layer = LayerPlan(heads, heads[:-1], radius=1, neurons=shape.ffn // 2, **more)
    bare = LayerPlan(heads, (), radius=None, neurons=0)
    layers = (layer, layer, bare, LayerPlan((), (), radius=None, neurons=0))
    return subject.random_plan(
        0, layers=layers, compensation=compensation, bidirectional=False, **fixed
    )


@pytest.mark.parametrize("baked", [True, False], ids=["baked", "in memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_visual_tokens_see_an_optimizer_step_at_once(
    subject: Subject, kind: str, baked: bool
) -> None:
    plan = halved(subject, kind, baked=baked)
    model = copy.deepcopy(subject.model)
    install(model, plan)
    first = tiny.logits(model, INPUTS)  # caches of an evaluation must not outlive a step
    train(model)
    live = tiny.logits(model, INPUTS)
    uninstall(model)
    with pruned(model, plan, check=False):
        again = tiny.logits(model, INPUTS)
    where = tiny.real_text(INPUTS)
    assert torch.equal(live[where], again[where])
    assert not torch.allclose(live[where], first[where], atol=1e-2)


def test_values_set_without_autograd_are_seen_too(subject: Subject) -> None:
    """Merging adapters writes to ``.data``, which counts no version."""
    plan = halved(subject, "mean", baked=False)
    model = copy.deepcopy(subject.model)
    install(model, plan)
    with torch.inference_mode():
        model(**INPUTS)
    for parameter in model.get_decoder().parameters():
        parameter.data *= 0.9
    live = tiny.logits(model, INPUTS)
    uninstall(model)
    with pruned(model, plan, check=False):
        assert torch.equal(tiny.logits(model, INPUTS), live)


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, excluding weights."""

    def __init__(self, model: nn.Module):
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._seen: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor


def gradients(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of all parameters, and the bytes that autograd kept."""
    model.zero_grad()
    torch.manual_seed(0)
    with Kept(model) as kept:
        value = loss(model)
    value.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in grads.items()}, kept.bytes


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(
    subject: Subject, kind: str, reentrant: bool
) -> None:
    plan = halved(subject, kind, baked=False)
    model = copy.deepcopy(subject.model)
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.1  # dropout drops the same ones when it is run again
    install(model, plan, trainable=True)
    model.train()
    expected, whole = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found, kept = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)
    assert kept < 0.5 * whole, f"{kept} bytes of {whole}"


def test_checkpointing_is_off_in_evaluation_and_refuses_a_filled_cache(mha: Subject) -> None:
    model = copy.deepcopy(mha.model)
    install(model, mha.random_plan(3))
    plain = tiny.logits(model, INPUTS)
    model.gradient_checkpointing_enable()
    assert torch.equal(tiny.logits(model, INPUTS), plain)
    cache = DynamicCache()
    model(**INPUTS, past_key_values=cache)
    assert model.train()(**INPUTS, use_cache=True).past_key_values is None
    step = {"input_ids": torch.full((2, 1), 7), "past_key_values": cache}
    with pytest.raises(ModelError, match="filled KV cache"):
        model(**step)


def test_attention_dropout_matches_the_dense_model(subject: Subject) -> None:
    """With a probability of one nothing is random: attention outputs nothing."""
    plan = subject.random_plan(1, compensation="none")
    model = copy.deepcopy(subject.model)
    layers = [*model.get_decoder().layers]
    with pruned(model, plan):
        plain = tiny.logits(model, INPUTS)
        for layer in layers:
            layer.self_attn.attention_dropout = 0.5
        assert torch.equal(tiny.logits(model, INPUTS), plain)
        model.train()
        assert not torch.equal(tiny.logits(model, INPUTS), tiny.logits(model, INPUTS))
        for layer in layers:
            layer.self_attn.attention_dropout = 1.0
        found = tiny.logits(model, INPUTS)
        model.eval()
        for layer in layers:  # dense: what attention gives without any weight
            output = layer.self_attn.o_proj
            output.weight.data.zero_()
        torch.testing.assert_close(found, tiny.logits(model, INPUTS))


def test_residual_dropouts_match_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-3 has them after attention and FFN; at one, only embeddings and the last norm remain."""
    options = {"resid_pdrop": 0.5, "num_attention_heads": 4, "num_key_value_heads": 4}
    monkeypatch.setattr(tiny, "text_config", lambda _: Phi3Config(**options, **tiny._COMMON))
    monkeypatch.setattr(
        llava.LLAVA.__class__, "backbone", lambda self, config: internvl.PHI3, raising=True
    )
    subject = tiny.make_subject("phi3")
    plan = subject.random_plan(1, layers=tiny.whole(subject).layers, compensation="none")
    model = subject.model
    with pruned(model, plan):
        model.train()
        assert not torch.equal(tiny.logits(model, INPUTS), tiny.logits(model, INPUTS))
        for layer in model.get_decoder().layers:
            layer.resid_attn_dropout.p = layer.resid_mlp_dropout.p = 1.0
        found = tiny.logits(model, INPUTS)
    torch.testing.assert_close(found, tiny.logits(model, INPUTS))  # stock, in training as well


def test_fitted_weights_are_parameters_only_on_request(subject: Subject) -> None:
    plan = halved(subject, "refit", baked=True)
    model = copy.deepcopy(subject.model)
    keys, before = list(model.state_dict()), copy.deepcopy(plan.tensors)
    with pruned(model, plan):
        plain = tiny.logits(model, INPUTS)
        assert list(model.state_dict()) == keys
        with pytest.raises(ModelError, match="no trainable fitted weights"):
            fitted_parameters(model)
    with pruned(model, plan, trainable=True):
        assert torch.equal(tiny.logits(model, INPUTS), plain)
        fitted = yopo.fitted_parameters(model)
        held = sum(len(weights) for weights in plan.tensors.refit.values())
        assert len(fitted) == held and all(p.requires_grad for p in fitted.values())
        assert len(model.state_dict()) == len(keys) + held
        for parameter in model.parameters():
            parameter.requires_grad = any(parameter is each for each in fitted.values())
        losses = train(model, 8)
        assert losses[-1] < losses[0]
    assert plan.tensors == before, "the plan's own are left alone"
    assert list(model.state_dict()) == keys


def test_an_adapter_and_fitted_weights_train_together(mha: Subject) -> None:
    plan = halved(mha, "refit", baked=True)
    model = copy.deepcopy(mha.model)
    install(model, plan, trainable=True)
    adapter = LoraConfig(r=2, target_modules=r".*language_model.*(q|v|up|down)_proj")
    peft_model = get_peft_model(model, adapter)
    fitted = fitted_parameters(peft_model)
    assert not any(each.requires_grad for each in fitted.values())  # PEFT freezes everything else
    for each in fitted.values():
        each.requires_grad_()
    before = {name: each.detach().clone() for name, each in fitted.items()}
    losses = train(peft_model, 8)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(each, before[name]) for name, each in fitted.items())


def test_loading_weights_without_fitted_ones_is_reported(
    mha: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Trainer that resumes loads only a checkpoint's shards."""
    plan = halved(mha, "refit", baked=True)
    model = copy.deepcopy(mha.model)
    dense = model.state_dict()
    install(model, plan)
    model.load_state_dict(dense)
    uninstall(model)
    install(model, plan, trainable=True)
    model.load_state_dict(model.state_dict())
    assert not capsys.readouterr().err
    model.load_state_dict(dense, strict=False)
    assert "do not include the fitted weights" in " ".join(capsys.readouterr().err.split())
