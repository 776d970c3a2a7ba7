"""The class token's attention is what the eager tower gives, wherever images are encoded."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE

from yopo.models.layout import LayoutProbe
from yopo.models.registry import family_of
from yopo.models.streams import Stream
from yopo.models.tower_attention import attention_path, laid_out
from yopo.reduction.registry import make_method
from yopo.runtime.install import pruned
from yopo.support.errors import ModelError

SCOPE = make_method("scope", 0.5)
ROWS = [[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, *PICTURE, 9]]


def eager(model: torch.nn.Module, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """(images, patches): the class token's eager attention in a layer, mean over heads."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    seen = tower(pixels, output_attentions=True).attentions[layer]
    patches = seen.mean(dim=1)[:, 0, 1:]
    return patches / patches.sum(dim=1, keepdim=True)


def observed(model: torch.nn.Module, run: object) -> list[torch.Tensor]:
    """The layouts' attention in every forward of the decoder."""
    family = family_of(model.config)
    path = attention_path(SCOPE, family, model.config)
    probe = LayoutProbe(model.base_model, family.grids_of, None, path)
    found = []

    def see(*_: object, **__: object) -> None:
        layout = probe.layout
        if layout is not None:
            found.append(layout.attention)

    handle = model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
    try:
        run()  # type: ignore[operator]
    finally:
        handle.remove()
        probe.remove()
    assert found
    return found


@pytest.mark.parametrize("feature_layer", [-1, -2, 1, [1, -2]])
@torch.no_grad()
def test_it_is_the_eager_towers(feature_layer: int | list[int]) -> None:
    model = tiny.make_subject("mha").oracle
    model = copy.deepcopy(model)
    model.config.vision_feature_layer = feature_layer
    if isinstance(feature_layer, list):
        model.model.multi_modal_projector.linear_1 = torch.nn.Linear(64, 64).double()
    inputs = tiny.as_dtype(tiny.batch(ROWS), torch.float64)
    (found,) = observed(model, lambda: model(**inputs))
    layer = {-1: 1, -2: 0, 1: 0}.get(feature_layer if isinstance(feature_layer, int) else -2)
    assert layer is not None
    expected = eager(model, inputs["pixel_values"], layer)
    torch.testing.assert_close(found[0, :16], expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], expected[1:].flatten(), rtol=1e-6, atol=1e-9)
    assert not found[0, 16:].any()


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generate_encodes_before_it_prefills(beams: int) -> None:
    model = tiny.make_subject("mha").model
    inputs = tiny.batch(ROWS)
    if beams > 1:
        tiny.skip_unless_beams_get_their_images(model, inputs)

    def run() -> None:
        model.generate(**inputs, max_new_tokens=2, num_beams=beams, suppress_tokens=[IMAGE])

    found = observed(model, run)[0]
    (alone,) = observed(model, lambda: model(**inputs))
    assert torch.equal(found, alone.repeat_interleave(beams, dim=0))


@torch.no_grad()
def test_images_carry_their_own() -> None:
    """Two images encoded, then prefilled in the other order."""
    model = tiny.make_subject("mha").model
    tiny.skip_unless_takes_encoded(model)
    family = family_of(model.config)
    path = attention_path(SCOPE, family, model.config)
    one, other = (tiny.batch([ROWS[0]], seed=seed) for seed in (1, 2))
    (first,) = observed(model, lambda: model(**one))
    (second,) = observed(model, lambda: model(**other))
    assert not torch.equal(first, second)
    probe = LayoutProbe(model.base_model, family.grids_of, None, path)
    seen: list[torch.Tensor] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda *_: seen.append(probe.layout.attention), with_kwargs=False
    )
    encoded = [
        model.get_image_features(each["pixel_values"], return_dict=True) for each in (one, other)
    ]
    for each in encoded:
        ids = {name: one[name] for name in ("input_ids", "attention_mask")}
        model.model(**ids, mm_encoder_outputs={"image": each})
    handle.remove()
    probe.remove()
    assert torch.equal(seen[0], first) and torch.equal(seen[1], second)


def test_other_images_have_none() -> None:
    visual = Stream(torch.arange(12).expand(2, -1), None, shared=True)
    for images, patches in ((3, 4), (5, 4), (2, 7)):
        found = laid_out(torch.rand(images, patches), visual)
        assert (found is None) is (24 % (images * patches) != 0)
    ragged = Stream(
        torch.arange(12).expand(2, -1), torch.arange(12) < torch.tensor([[12], [4]]), shared=False
    )
    assert laid_out(torch.rand(2, 4), ragged) is None  # rows of three images and one, not repeats
    found = laid_out(torch.ones(4, 4), ragged)
    assert found is not None and found.sum(dim=1).tolist() == [12.0, 4.0]


def test_images_encoded_elsewhere_are_refused() -> None:
    subject = tiny.make_subject("mha")
    tiny.skip_unless_takes_encoded(subject.model)
    plan = replace(tiny.whole(subject), reduction=SCOPE)
    inputs = tiny.batch([ROWS[0]])
    encoded = subject.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with pruned(subject.model, plan), pytest.raises(ModelError, match="attention on these images"):
        subject.model.model(**inputs, mm_encoder_outputs={"image": encoded})


def test_towers_without_a_class_token_are_refused() -> None:
    model = copy.deepcopy(tiny.make_subject("mha").model)
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ModelError, match="scope needs the attention of a class token"):
        attention_path(SCOPE, family_of(model.config), model.config)
    assert attention_path(make_method("par", 0.5), family_of(model.config), model.config) is None
