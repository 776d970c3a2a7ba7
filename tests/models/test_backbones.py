"""The description of a backbone matches the model in memory."""

from __future__ import annotations

import sys

import torch
from zoo import Specimen


def test_the_rotation_is_that_of_the_models_own_module(specimen: Specimen) -> None:
    """This holds for every transformers module that it is taken from."""
    backbone = specimen.family.backbone(specimen.model.config)
    decoder = specimen.model.get_decoder()
    attention = decoder.layers[0].self_attn
    own = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    torch.manual_seed(0)
    queries, keys = (
        torch.randn(2, 4, 5, attention.head_dim),
        torch.randn(2, 2, 5, attention.head_dim),
    )
    positions = torch.arange(5).expand(backbone.position_axes, 2, -1)
    rotary = decoder.rotary_emb(queries, positions if backbone.position_axes > 1 else positions[0])
    for found, expected in zip(
        backbone.rotate(queries, keys, *rotary), own(queries, keys, *rotary), strict=True
    ):
        assert torch.equal(found, expected)


def test_norms_per_head_are_named_where_they_are(specimen: Specimen) -> None:
    backbone = specimen.family.backbone(specimen.model.config)
    attention = specimen.model.get_decoder().layers[0].self_attn
    norms = {name for name, _ in attention.named_children() if name.endswith("norm")}
    assert norms == set(backbone.head_norms or ())


def test_features_for_later_layers_are_named_where_they_are_handed_over(specimen: Specimen) -> None:
    backbone = specimen.family.backbone(specimen.model.config)
    seen = []
    handle = specimen.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    inputs = specimen.inputs([[1, 5, 6, "L", 7, 8, 9]])
    with torch.no_grad():
        specimen.model(**inputs)
    handle.remove()
    visual = torch.isin(inputs["input_ids"], torch.tensor(specimen.entry.placeholders)).sum()
    stacks = [
        each
        for kwargs in seen
        for each in kwargs.values()
        if isinstance(each, list | tuple) and len(each) and isinstance(each[0], torch.Tensor)
    ]
    added = backbone.added_features(seen[0])
    assert [tuple(each) for each in stacks] == ([added] if added else [])
    assert all(len(each) == visual for each in added)
