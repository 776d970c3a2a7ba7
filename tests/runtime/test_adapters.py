"""With LoRA on a pruned model, visual tokens follow the adapted weights, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from tiny import PICTURE, Subject
from torch import nn

from yopo.plans.schema import PruningPlan
from yopo.runtime.install import install, pruned, uninstall
from yopo.runtime.reference import reference
from yopo.support.errors import ModelError, YopoError

INPUTS = tiny.batch([[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, *PICTURE, 9]])
ALL = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    """Return the model with LoRA on all projections of its decoder, far from the identity."""
    chosen = {"r": 4, "target_modules": ALL, "init_lora_weights": False, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(**chosen)).eval()


def check(found: torch.Tensor, merged: nn.Module, plan: PruningPlan) -> None:
    """Compare with the merged model, pruned, and its float64 oracle."""
    oracle = tiny.exact(merged)
    with pruned(merged, plan, check=False):
        usual = tiny.logits(merged, INPUTS)
    with pruned(oracle, plan, check=False):
        exact = tiny.logits(oracle, INPUTS)
    tiny.assert_close(found, usual, exact, tiny.real_text(INPUTS))


def merged(model: PeftModel) -> nn.Module:
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize("seed", range(4))
def test_an_adapter_on_a_pruned_model_matches_the_merged_model(subject: Subject, seed: int) -> None:
    plan = subject.random_plan(seed)
    model = copy.deepcopy(subject.model)
    expected = merged(adapted(copy.deepcopy(model)))
    install(model, plan)
    before = tiny.logits(model, INPUTS)
    peft_model = adapted(model)
    found = tiny.logits(peft_model, INPUTS)
    check(found, expected, plan)
    where = tiny.real_text(INPUTS)
    assert not torch.allclose(found[where], before[where], atol=1e-2)
    with peft_model.disable_adapter():
        assert torch.equal(tiny.logits(peft_model, INPUTS)[where], before[where])
    peft_model.merge_adapter()
    check(tiny.logits(peft_model, INPUTS), expected, plan)
    with peft_model.disable_adapter():  # PEFT unmerges it
        close = tiny.logits(peft_model, INPUTS)[where]
    torch.testing.assert_close(close, before[where], atol=1e-4, rtol=1e-4)
    check(tiny.logits(peft_model.merge_and_unload(), INPUTS), expected, plan)


@pytest.mark.parametrize("seed", range(4))
def test_a_model_with_an_adapter_can_be_pruned(subject: Subject, seed: int) -> None:
    plan = subject.random_plan(seed)
    model = adapted(copy.deepcopy(subject.model))
    dense, expected = tiny.logits(model, INPUTS), merged(model)
    with pruned(model, plan) as same:
        assert same is model
        check(tiny.logits(model, INPUTS), expected, plan)
    assert torch.equal(tiny.logits(model, INPUTS), dense)
    model.merge_adapter()
    with pytest.raises(ModelError, match="fingerprint"), pruned(model, plan):
        pass


def test_adapter_biases_and_several_adapters_are_supported() -> None:
    subject = tiny.make_subject("gqa")  # every projection has a bias
    for seed in range(3):
        plan = subject.random_plan(seed)
        model = adapted(copy.deepcopy(subject.model), lora_bias=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and name.endswith("bias"):
                    parameter.normal_(std=0.2)
        more = {"r": 2, "target_modules": ALL, "init_lora_weights": False, "lora_alpha": 3}
        model.add_adapter("other", LoraConfig(**more))
        model.base_model.set_adapter(["default", "other"])
        expected = merged(model)
        with pruned(model, plan):
            check(tiny.logits(model, INPUTS), expected, plan)


def test_adapters_in_another_precision_are_cast_as_peft_does(mha: Subject) -> None:
    plan = mha.random_plan(3)
    model = adapted(copy.deepcopy(mha.model).to(torch.bfloat16))
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    with pruned(model, plan):
        found = tiny.logits(model, INPUTS)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_adapter_gradients_match_the_reference(subject: Subject, seed: int) -> None:
    """Visual tokens take part in training; the reference calls whole modules and masks."""
    plan = subject.random_plan(seed)
    model = adapted(copy.deepcopy(subject.oracle))
    model = model.double()
    where, grads = tiny.real_text(INPUTS), []
    for run in (pruned, reference):
        model.zero_grad()
        with run(model.get_base_model(), plan, check=False):
            logits = model(**tiny.as_dtype(INPUTS, torch.float64)).logits
            logits[where].square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-9, rtol=1e-6, msg=name)


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "dora": (lambda model: adapted(model, use_dora=True), "has a Dora adapter"),
    "ia3": (
        lambda model: get_peft_model(
            model, IA3Config(target_modules=ALL, feedforward_modules=r".*down_proj")
        ),
        "_proj is a Linear, expected a plain",
    ),
    "loha": (
        lambda model: get_peft_model(model, LoHaConfig(target_modules=ALL)),
        "_proj is a Linear, expected a plain",
    ),
}


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_are_refused(mha: Subject, kind: str, order: str) -> None:
    adapt, message = REFUSED[kind]
    plan = mha.random_plan(3, compensation="none")
    model = copy.deepcopy(mha.model)
    with pytest.raises(ModelError, match=message):
        if order == "before":
            with pruned(adapt(model), plan):
                pass
        else:
            with pruned(model, plan):
                tiny.logits(adapt(model), INPUTS)


def test_prefixes_in_the_cache_are_refused(mha: Subject) -> None:
    plan = mha.random_plan(3)
    model = copy.deepcopy(mha.model)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        num_layers=4,
        token_dim=64,
        num_attention_heads=4,
    )
    with pruned(model, plan), pytest.raises(YopoError, match="cache"):
        tiny.logits(get_peft_model(model, config), INPUTS)


def test_a_different_adapter_per_row_is_refused(mha: Subject) -> None:
    plan = mha.random_plan(3)
    model = adapted(copy.deepcopy(mha.model))
    model.add_adapter("other", LoraConfig(r=2, target_modules=ALL))
    with pruned(model, plan), pytest.raises(ModelError, match="adapter_names"):
        tiny.logits(model, INPUTS | {"adapter_names": ["default", "other"]})


def test_uninstalling_under_an_adapter_leaves_the_dense_model(mha: Subject) -> None:
    plan = mha.random_plan(3)
    model = copy.deepcopy(mha.model)
    install(model, plan)
    peft_model = adapted(model)
    uninstall(peft_model)
    dense = tiny.logits(adapted(copy.deepcopy(mha.model)), INPUTS)
    assert torch.equal(tiny.logits(peft_model, INPUTS), dense)
