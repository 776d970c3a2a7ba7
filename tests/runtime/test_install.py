"""Pruning a model in memory leaves no trace after the block, and refuses some models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny import PICTURE, Subject
from torch import nn
from transformers import LlavaForConditionalGeneration, MistralConfig

from yopo.models.fingerprint import fingerprint_of_decoder
from yopo.plans.file import to_yaml
from yopo.plans.storage import write_plan
from yopo.plans.tensors import PlanTensors
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference
from yopo.support.errors import ModelError, PlanError

INPUTS = tiny.batch([[1, 5, 6, *PICTURE, 7, 8]])
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")


def portrait(model: LlavaForConditionalGeneration) -> dict[str, Any]:
    """Copy everything about a model that pruning might change."""
    logits = tiny.logits(model, INPUTS)  # first: transformers installs its own hooks on demand
    state = model.state_dict(keep_vars=True)
    return {
        "identities": {name: id(tensor) for name, tensor in state.items()},
        "addresses": {name: tensor.data_ptr() for name, tensor in state.items()},
        "values": {name: tensor.detach().clone() for name, tensor in state.items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            (name, kind): list(getattr(module, kind))
            for name, module in model.named_modules()
            for kind in HOOKS
        },
        "config": model.config.to_dict(),
        "logits": logits,
    }


def assert_unchanged(before: dict[str, Any], model: LlavaForConditionalGeneration) -> None:
    after = portrait(model)
    for name, value in before.pop("values").items():
        assert torch.equal(value, after["values"][name]), name
    assert torch.equal(before.pop("logits"), after["logits"])
    assert before == {key: after[key] for key in before}


@pytest.mark.parametrize("run", [pruned, reference])
def test_leaving_the_block_restores_the_model(subject: Subject, run: Callable) -> None:
    before = portrait(subject.model)
    plan = subject.random_plan(3)
    with run(subject.model, plan) as model:
        assert model is subject.model
        assert not torch.equal(tiny.logits(model, INPUTS), before["logits"])
        model.generate(**INPUTS, max_new_tokens=3, use_cache=run is pruned)
    assert_unchanged(before, subject.model)


@pytest.mark.parametrize("run", [pruned, reference])
def test_an_exception_inside_the_block_restores_it_too(subject: Subject, run: Callable) -> None:
    before = portrait(subject.model)
    plan = subject.random_plan(3)
    with pytest.raises(KeyboardInterrupt), run(subject.model, plan):
        raise KeyboardInterrupt
    assert_unchanged(before, subject.model)


@pytest.mark.parametrize("run", [pruned, reference])
def test_an_exception_inside_a_forward_restores_it_too(subject: Subject, run: Callable) -> None:
    before = portrait(subject.model)
    plan = subject.random_plan(3)

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory"), run(subject.model, plan):
        down = subject.model.get_decoder().layers[2].mlp.down_proj
        handle = down.register_forward_pre_hook(fail)
        try:
            tiny.logits(subject.model, INPUTS)
        finally:
            handle.remove()
    assert_unchanged(before, subject.model)


def test_state_dict_and_class_name_are_kept_while_pruned(subject: Subject) -> None:
    keys, name = list(subject.model.state_dict()), type(subject.model.get_decoder()).__name__
    plan = subject.random_plan(3)
    with pruned(subject.model, plan):
        assert list(subject.model.state_dict()) == keys
        assert type(subject.model.get_decoder()).__name__ == name


def test_the_same_model_can_be_pruned_again(mha: Subject) -> None:
    said = []
    for seed in (1, 2, 1):
        plan = mha.random_plan(seed)
        with pruned(mha.model, plan):
            said.append(tiny.logits(mha.model, INPUTS))
    assert torch.equal(said[0], said[2])
    assert not torch.equal(said[0], said[1])


def test_nested_use_is_refused_and_the_outer_block_continues(mha: Subject) -> None:
    before = portrait(mha.model)
    plan = mha.random_plan(3)
    with pruned(mha.model, plan):
        outer = tiny.logits(mha.model, INPUTS)
        with pytest.raises(ModelError, match="already pruned"):
            with pruned(mha.model, plan):
                pass
        assert torch.equal(tiny.logits(mha.model, INPUTS), outer)
    assert_unchanged(before, mha.model)


def test_a_plan_is_read_from_its_file(mha: Subject, tmp_path: Any) -> None:
    plan = mha.random_plan(3, baked=False, compensation="mean")
    path = tmp_path / "plan.yaml"
    write_plan(plan, str(path), force=False)
    with pruned(mha.model, plan):
        expected = tiny.logits(mha.model, INPUTS)
    with pruned(mha.model, path):
        assert torch.equal(tiny.logits(mha.model, INPUTS), expected)
    with pytest.raises(PlanError, match="no such file"), pruned(mha.model, tmp_path / "not.yaml"):
        pass


def test_the_pruned_parts_follow_the_model_to_another_dtype(mha: Subject) -> None:
    model = tiny.llava("mha")
    plan = mha.random_plan(3, baked=False, compensation="mean")
    with pruned(model, plan):
        model.to(torch.bfloat16)
        found = tiny.logits(model, INPUTS)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


class Quantised(nn.Linear):
    """A linear layer that does not multiply with its weight, as quantizers and PEFT make."""


def spoiled(change: Callable[[nn.Module], None]) -> LlavaForConditionalGeneration:
    model = tiny.llava("mha")
    change(model.get_decoder())
    return model


def set_quantised(decoder: nn.Module) -> None:
    old = decoder.layers[1].mlp.up_proj
    decoder.layers[1].mlp.up_proj = Quantised(old.in_features, old.out_features, bias=False)
    decoder.layers[1].mlp.up_proj.weight = old.weight


def set_integer(decoder: nn.Module) -> None:
    weight = decoder.layers[1].self_attn.k_proj.weight.detach().to(torch.int8)
    decoder.layers[1].self_attn.k_proj.weight = nn.Parameter(weight, requires_grad=False)


def set_other_weights(decoder: nn.Module) -> None:
    with torch.no_grad():
        decoder.layers[3].mlp.up_proj.weight[0, 0] += 1.0


def set_meta(decoder: nn.Module) -> None:
    decoder.layers[3].to("meta")


REFUSED_MODELS = {
    "other weights": (set_other_weights, "fingerprint"),
    "a quantised projection": (set_quantised, "layer 1's up_proj is a Quantised"),
    "integer weights": (set_integer, "layer 1's k_proj is a Linear"),
    "layers without weights": (set_meta, "layer 3's q_proj has no weights"),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_that_cannot_be_sliced_are_refused_untouched(mha: Subject, name: str) -> None:
    change, message = REFUSED_MODELS[name]
    model = spoiled(change)
    decoder = model.get_decoder()
    before = (type(decoder), sorted(vars(decoder)), len(model.base_model._forward_pre_hooks))
    with pytest.raises(ModelError, match=message), pruned(model, tiny.whole(mha)):
        pass
    assert before == (
        type(decoder),
        sorted(vars(decoder)),
        len(model.base_model._forward_pre_hooks),
    )


def test_without_the_check_other_weights_pass_but_not_none(mha: Subject) -> None:
    with pruned(spoiled(set_other_weights), tiny.whole(mha), check=False) as model:
        assert tiny.logits(model, INPUTS).isfinite().all()
    with pytest.raises(ModelError, match="layer 3's q_proj has no weights"):
        with pruned(spoiled(set_meta), tiny.whole(mha), check=False):
            pass


def test_layers_without_weights_have_no_fingerprint(mha: Subject) -> None:
    plans = map(mha.random_plan, range(99))
    plan = next(each for each in plans if each.visual_depth <= 3)
    with pytest.raises(ModelError, match="is on the meta device"), pruned(spoiled(set_meta), plan):
        pass


def test_another_shape_or_family_is_refused(mha: Subject) -> None:
    with (
        pytest.raises(ModelError, match="made for tiny-mha"),
        pruned(tiny.llava("gqa"), tiny.whole(mha)),
    ):
        pass
    plan = tiny.whole(mha)
    other = replace(plan, model=replace(plan.model, family="qwen2_5_vl"))
    with pytest.raises(ModelError, match="qwen2_5_vl"), pruned(mha.model, other):
        pass


def test_plans_in_memory_need_their_tensors(mha: Subject) -> None:
    """Without an order, the first neurons would be kept instead of the important ones."""
    plan = mha.random_plan(3, baked=False, compensation="mean")
    assert plan.needs_order
    tensors = plan.tensors
    lacking = {
        "lacks neuron_order": replace(tensors, neuron_order=None),
        "lacks the means": replace(tensors, head_mean=None),
        "not a permutation": replace(tensors, neuron_order=tensors.neuron_order * 0),
        "expected": replace(tensors, neuron_mean=tensors.neuron_mean[:, 1:]),
    }
    for message, wrong in lacking.items():
        for run in (pruned, reference):
            with pytest.raises(PlanError, match=message):
                with run(mha.model, replace(plan, tensors=wrong)):
                    pass
    with pytest.raises(PlanError, match="lacks"), pruned(mha.model, plan.without_tensors()):
        pass


def test_a_baked_plan_takes_neurons_in_the_checkpoints_order(mha: Subject) -> None:
    baked = mha.random_plan(3, baked=True, compensation="none")
    assert baked.needs_order and baked.tensors.neuron_order is None
    order = torch.arange(mha.shape.ffn).repeat(mha.shape.layers, 1)
    unbaked = replace(baked, baked=False, tensors=PlanTensors(neuron_order=order))
    with pruned(mha.model, baked):
        expected = tiny.logits(mha.model, INPUTS)
    with pruned(mha.model, unbaked):
        assert torch.equal(tiny.logits(mha.model, INPUTS), expected)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_requests_for_all_hidden_states_are_refused(mha: Subject, option: str) -> None:
    plan = mha.random_plan(3)
    model = copy.deepcopy(mha.model)  # requesting them installs transformers' own hooks
    with pruned(model, plan):
        with pytest.raises(ModelError, match=option.removeprefix("output_")):
            tiny.logits(model, INPUTS | {option: True})


@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.ones(1, 1, 21, 21), "4-D"), (torch.ones(1, 20), r"expected \(1, 21\)")],
)
def test_other_attention_masks_are_refused(mha: Subject, mask: torch.Tensor, message: str) -> None:
    plan = mha.random_plan(3)
    with pruned(mha.model, plan), pytest.raises(ModelError, match=message):
        tiny.logits(mha.model, INPUTS | {"attention_mask": mask})


def test_image_tokens_that_are_not_whole_images_are_refused(mha: Subject) -> None:
    inputs = INPUTS | tiny.batch([[1, 5, *PICTURE[1:], 7]])
    inputs["pixel_values"] = tiny.pictures(1)
    plan = mha.random_plan(3)
    with pruned(mha.model, plan), pytest.raises(ModelError, match="15 visual tokens"):
        tiny.logits(mha.model, inputs)


def test_a_sliding_window_holds_until_it_is_outgrown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within Mistral's window nothing differs; beyond it the pruned model refuses."""

    def config(backbone: str) -> MistralConfig:
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 30}
        return MistralConfig(**sizes, **tiny._COMMON)

    monkeypatch.setattr(tiny, "text_config", config)
    subject = tiny.make_subject("mistral")
    assert subject.identity.fingerprint == fingerprint_of_decoder(subject.oracle.get_decoder())
    usual, oracle = tiny.logits(subject.model, INPUTS), tiny.logits(subject.oracle, INPUTS)
    options = {"do_sample": False, "suppress_tokens": [tiny.IMAGE, tiny.EOS]}
    dense = subject.model.generate(**INPUTS, max_new_tokens=9, **options)
    with pruned(subject.model, tiny.whole(subject)):
        found = tiny.logits(subject.model, INPUTS)
        tiny.assert_close(found, usual, oracle, tiny.real(INPUTS))
        assert torch.equal(subject.model.generate(**INPUTS, max_new_tokens=9, **options), dense)
        with pytest.raises(ModelError, match="window of 30"):
            subject.model.generate(**INPUTS, max_new_tokens=12, **options)


def test_a_plan_is_left_as_it_was(mha: Subject) -> None:
    plan = mha.random_plan(3)
    before, tensors = to_yaml(plan), copy.deepcopy(plan.tensors)
    with pruned(mha.model, plan):
        tiny.logits(mha.model, INPUTS)
    assert to_yaml(plan) == before and plan.tensors == tensors


def test_head_positions_are_moved_once_per_device(mha: Subject) -> None:
    plan = mha.random_plan(3)
    with pruned(mha.model, plan):
        state = mha.model.get_decoder().yopo
        here = torch.device("cpu")
        assert state.splits(here) is state.splits(here)
