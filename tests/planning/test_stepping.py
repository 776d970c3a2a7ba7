"""The dense walk follows the stock decoder, sees only visual tokens and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from zoo import PROMPTS, Specimen

from yopo.data.prompts import Batch
from yopo.fitting.layerwise import DenseWalk, enter
from yopo.support.errors import DataError, ModelError


@torch.no_grad()
def stock(specimen: Specimen, batch: Batch) -> dict[str, list[torch.Tensor]]:
    """Record the states around every layer of a stock forward, by its own hooks.

    Returns:
        ``before``, ``middle`` and ``after`` each layer, and ``next``: the input that follows.
    """
    decoder, found = specimen.model.get_decoder(), {}
    names = specimen.family.backbone(specimen.model.config)

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, *rest: found.setdefault(name, []).append(
            (rest[0] if rest else args[0]).clone()
        )

    with ExitStack() as hooks:
        for layer in decoder.layers:
            norm = getattr(layer, names.ffn_norm)
            for handle in (
                layer.register_forward_pre_hook(note("before")),
                norm.register_forward_pre_hook(note("middle")),
                layer.register_forward_hook(note("after")),
            ):
                hooks.callback(handle.remove)
        hooks.callback(decoder.norm.register_forward_pre_hook(note("last")).remove)
        specimen.model.base_model(**batch.inputs, use_cache=False)
    found["next"] = found["before"][1:] + found.pop("last")
    return found


def visual(specimen: Specimen, batch: Batch) -> torch.Tensor:
    """Return (batch, sequence) bool, based only on token ids."""
    return torch.isin(batch.inputs["input_ids"], torch.tensor(specimen.entry.placeholders))


def leftovers(model: nn.Module) -> list[str]:
    """Return hooks anywhere in a model, and methods set on a module instead of its class."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}: hook" for _ in (*module._forward_hooks, *module._forward_pre_hooks)]
        own = [key for key in vars(module) if callable(getattr(type(module), key, None))]
        own += [key for key in vars(module) if key.startswith("_yopo")]
        found += [f"{name}.{key}" for key in own]
    return sorted(found)


@pytest.fixture
def clean(specimen: Specimen) -> list[str]:
    """What a stock forward leaves: vision towers in transformers keep their own hooks."""
    inputs = specimen.inputs(PROMPTS["one image"])
    stock(specimen, Batch(inputs, None, (None,)))
    return leftovers(specimen.model)


def test_the_walk_matches_the_stock_forward(specimen: Specimen, batches: list[Batch]) -> None:
    expected = [stock(specimen, batch) for batch in batches]
    masks = [visual(specimen, batch) for batch in batches]
    walk = DenseWalk(specimen.model, enter(specimen.model, batches))
    assert len(walk.batches) == len(batches)
    for number in range(specimen.identity.shape.layers):
        steps = zip(walk.steps(number), walk.batches, expected, masks, strict=True)
        for (before, states), batch, truth, mask in steps:
            for name, rows in (("before", before), *vars(states).items()):
                assert rows.shape == (int(mask.sum()), specimen.identity.shape.hidden)
                assert torch.equal(rows, truth[name][number][mask]), (number, name)
            assert torch.equal(batch.hidden, truth["next"][number]), number


def test_the_batches_have_padding_and_a_row_without_images(
    specimen: Specimen, batches: list[Batch]
) -> None:
    """Guards the test above: rows differ in images, are padded, and one has no image at all."""
    counts = [visual(specimen, batch).sum(dim=1).tolist() for batch in batches]
    assert len(set(counts[1])) == 2 and counts[2][1] == 0 < counts[2][0]
    assert any(int(batch.inputs["attention_mask"].min()) == 0 for batch in batches)


def test_a_batch_without_any_image_is_left_out(specimen: Specimen, clean: list[str]) -> None:
    def batch(name: str) -> Batch:
        inputs = specimen.inputs(PROMPTS[name])
        return Batch(inputs, None, (None,) * len(inputs["input_ids"]))

    walk = DenseWalk(
        specimen.model,
        enter(specimen.model, iter([batch("text"), batch("one image"), batch("text")])),
    )
    assert len(walk.batches) == 1
    assert walk.batches[0].hidden.shape[:2] == batch("one image").inputs["input_ids"].shape
    with pytest.raises(DataError, match="No calibration pair holds an image"):
        DenseWalk(specimen.model, enter(specimen.model, [batch("text")]))
    assert leftovers(specimen.model) == clean


def test_nothing_is_left_on_the_model(
    specimen: Specimen, batches: list[Batch], clean: list[str]
) -> None:
    before = stock(specimen, batches[0])["next"][-1]
    weights = {name: value.clone() for name, value in specimen.model.state_dict().items()}
    walk = DenseWalk(specimen.model, enter(specimen.model, batches))
    for number in range(specimen.identity.shape.layers):
        walk.step(number)
    assert leftovers(specimen.model) == clean
    assert torch.equal(stock(specimen, batches[0])["next"][-1], before)
    after = specimen.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


class Broken(RuntimeError):
    """An error raised on purpose."""


def fail(*_: Any, **__: Any) -> None:
    raise Broken


@pytest.mark.parametrize("where", ["entering", "stepping"])
def test_nothing_is_left_after_an_exception(
    specimen: Specimen, batches: list[Batch], clean: list[str], where: str
) -> None:
    walk = DenseWalk(specimen.model, enter(specimen.model, batches))
    part = specimen.model.get_decoder().layers[1].mlp
    handle = part.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Broken):
            if where == "entering":
                DenseWalk(specimen.model, enter(specimen.model, batches))
            for number in range(specimen.identity.shape.layers):
                walk.step(number)
    finally:
        handle.remove()
    assert leftovers(specimen.model) == clean


def test_layers_that_take_states_by_name_are_stepped_as_well(specimen: Specimen) -> None:
    """A hook sees the dictionary that the layer is called with, so it must not be changed."""
    layer = specimen.model.get_decoder().layers[0]
    batch = Batch(specimen.inputs(PROMPTS["one image"]), None, (None,))
    expected = stock(specimen, batch)["next"][0]
    call = type(layer).__call__

    class ByName(type(layer)):
        def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return call(self, *args, hidden_states=hidden_states, **kwargs)

    layer.__class__ = ByName
    try:
        walk = DenseWalk(specimen.model, enter(specimen.model, [batch]))
        walk.step(0)
    finally:
        layer.__class__ = ByName.__mro__[1]
    assert torch.equal(walk.batches[0].hidden, expected)


def test_weights_that_cannot_be_read_are_refused(specimen: Specimen, batches: list[Batch]) -> None:
    names = specimen.family.backbone(specimen.model.config)
    mlp = specimen.model.get_decoder().layers[-1].mlp
    down = getattr(mlp, names.down)
    setattr(mlp, names.down, nn.Sequential(down))
    try:
        with pytest.raises(ModelError, match="expected a plain linear layer"):
            DenseWalk(specimen.model, enter(specimen.model, batches))
    finally:
        setattr(mlp, names.down, down)
