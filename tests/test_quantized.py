"""Pruned models with quantized weights compute with the unpacked weights, or are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import PICTURE, Subject
from torch.nn.functional import linear
from transformers import AutoModelForImageTextToText, PreTrainedModel

import yopo
from yopo.checkpoint.bake import bake
from yopo.runtime.install import pruned
from yopo.runtime.packed import PackedPart, unpacked
from yopo.serving.loading import read_baked_plan
from yopo.support.errors import ModelError

ROWS = [[1, 5, 6, *PICTURE, 7, 8, 9, 10]]


class Packed(torch.Tensor):
    """Int8 with one scale, which can only be applied and unpacked."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Packed:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)
        made.values, made.scale = values, scale
        return made

    @classmethod
    def of(cls, weight: torch.Tensor) -> Packed:
        scale = weight.abs().max() / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self) -> torch.Tensor:
        return self.values * self.scale

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is linear:
            args = [each.dequantize() if isinstance(each, Packed) else each for each in args]
            return linear(*args, **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"Packed has no {function}")


def pack(model: PreTrainedModel) -> None:
    """Pack every projection of the decoder, as a quantizer does."""
    for module in model.get_decoder().layers.modules():
        if isinstance(module, torch.nn.Linear):
            packed = Packed.of(module.weight.detach())
            module.weight = torch.nn.Parameter(packed, requires_grad=False)


def unpacked_copy(model: PreTrainedModel, like: PreTrainedModel) -> PreTrainedModel:
    """Return a stock model whose linear layers have the unpacked values of a quantized one."""
    copied = copy.deepcopy(like)
    ours = dict(model.named_modules())
    with torch.no_grad():
        for name, module in copied.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(unpacked(ours[name].weight))
    return copied


@pytest.fixture(scope="module", params=["none", "mean", "refit"])
def baked(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    """A baked checkpoint with heads in ragged groups, so that some parts are not slices."""
    gqa = tiny.make_subject("gqa")
    folder = tmp_path_factory.mktemp("quantized")
    gqa.model.save_pretrained(folder / "source")
    plan = gqa.random_plan(7, compensation=request.param, baked=False)
    bake(plan, folder / "source", folder / "out")
    return folder / "out"


def check_numbers(found: PreTrainedModel, path: Path) -> None:
    """Compare with the same plan on a stock model with the unpacked values."""
    stock = AutoModelForImageTextToText.from_pretrained(path)
    inputs = tiny.batch(ROWS)
    where = tiny.real_text(inputs)
    usual = unpacked_copy(found, stock)
    with pruned(usual, read_baked_plan(path), check=False):
        expected = tiny.logits(usual, inputs)[where]
    dense = tiny.logits(yopo.load(path), inputs)[where]
    assert torch.allclose(tiny.logits(found, inputs)[where], expected, atol=1e-3)
    assert not torch.allclose(dense, expected, atol=1e-2)  # quantizing did something


def test_weights_that_cannot_be_sliced_are_partly_unpacked(baked: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(baked)
    pack(model)
    with pruned(model, read_baked_plan(baked), check=False):
        check_numbers(model, baked)


def test_weights_that_are_packed_later_are_unpacked_too(baked: Path) -> None:
    model = yopo.load(baked)
    tiny.logits(model, tiny.batch(ROWS))
    stock = AutoModelForImageTextToText.from_pretrained(baked)
    pack(model)
    pack(stock)
    inputs = tiny.batch(ROWS)
    with pruned(stock, read_baked_plan(baked), check=False):
        expected = tiny.logits(stock, inputs)
    # Parts that had been copied keep the values from before, which are the better ones.
    assert torch.allclose(tiny.logits(model, inputs), expected, atol=0.5)


def test_a_part_is_sliced_once_per_weight() -> None:
    part, first = PackedPart(torch.arange(2, 5), columns=True), Packed.of(torch.randn(4, 6))
    found = part.cut(first)
    assert torch.equal(found, first.dequantize()[:, 2:5]) and part.cut(first) is found
    second = Packed.of(torch.randn(4, 6))
    assert torch.equal(part.cut(second), second.dequantize()[:, 2:5])


def test_a_quantized_model_in_memory_has_no_fingerprint(mha: Subject) -> None:
    model = copy.deepcopy(mha.model)
    pack(model)
    plan = mha.random_plan(7)
    with pytest.raises(ModelError, match="is a Packed, which has no fingerprint"):
        with pruned(model, plan):
            pass


def test_layers_of_another_quantizer_are_refused_with_alternatives(mha: Subject) -> None:
    class Linear4bit(torch.nn.Linear):
        """Has the name of bitsandbytes' layer."""

    model = copy.deepcopy(mha.model)
    layer = model.get_decoder().layers[0].self_attn
    layer.q_proj = Linear4bit(*layer.q_proj.weight.shape[::-1])
    with pytest.raises(ModelError, match=r"is a Linear4bit[\s\S]*quantize with torchao"):
        with pruned(model, tiny.whole(mha), check=False):
            pass


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("way", ["while loading", "trust_remote_code", "afterwards"])
def test_torchao_weight_only_quantization_works(baked: Path, kind: str, way: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    config = getattr(quantization, kind)()
    if way == "afterwards":
        model = yopo.load(baked)
        quantization.quantize_(model.get_decoder(), config)
        assert type(model.get_decoder().layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
        logits = tiny.logits(model, tiny.batch(ROWS))
        assert torch.isfinite(logits).all() and yopo.is_pruned(model)
        return
    options = {"quantization_config": TorchAoConfig(config)}
    if way == "while loading":
        model = yopo.load(baked, **options)
    else:
        options["trust_remote_code"] = True
        model = AutoModelForImageTextToText.from_pretrained(baked, **options)
    assert yopo.is_pruned(model)
    check_numbers(model, baked)
