"""Models have shapes, grids, names, and a fingerprint that distinguishes checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny import Subject
from transformers import LlamaConfig, LlavaConfig

from yopo.models.family import DECODER_KEY, shape_of, square_grids
from yopo.models.fingerprint import digest, fingerprint_of_decoder, sample
from yopo.models.llava import LLAVA
from yopo.models.registry import ALIASES, FAMILIES, family_named, family_of, resolve
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape
from yopo.support.errors import ModelError


def test_shapes_are_read_from_the_configuration() -> None:
    expected = {
        "mha": ModelShape(layers=4, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=96),
        "gqa": ModelShape(layers=4, hidden=60, heads=6, kv_heads=2, head_dim=16, ffn=96),
        "qwen2": ModelShape(layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96),
    }
    for backbone, shape in expected.items():
        assert shape_of(LlavaConfig(text_config=tiny.text_config(backbone))) == shape
    default = shape_of(LlavaConfig(text_config=LlamaConfig()))
    assert default == ModelShape(32, 4096, 32, 32, 128, 11008)


def test_shapes_are_those_of_the_weights(subject: Subject) -> None:
    shape = subject.shape
    for layer in subject.model.get_decoder().layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_proj.weight.shape == (shape.heads * shape.head_dim, shape.hidden)
        assert attention.v_proj.weight.shape == (shape.kv_heads * shape.head_dim, shape.hidden)
        assert mlp.down_proj.weight.shape == (shape.hidden, shape.ffn)


def test_square_grids_split_runs_into_whole_images() -> None:
    assert square_grids([32, 0, 16], 16) == [(Grid(4, 4),) * 2, (), (Grid(4, 4),)]
    with pytest.raises(ModelError, match="20 visual tokens are not a whole number of images of 16"):
        square_grids([16, 20], 16)


def test_llava_grids_come_from_its_tower() -> None:
    config = LlavaConfig()  # 336 pixels by patches of 14
    assert LLAVA.grids_of(config, [[(7, 576)], [(7, 576), (7, 576)]], {}) == [
        (Grid(24, 24),),
        (Grid(24, 24),) * 2,
    ]
    config.vision_feature_select_strategy = "full"
    assert LLAVA.grids_of(config, [[(7, 577)]], {}) == [(Grid(1, 1), Grid(24, 24))]
    with pytest.raises(ModelError, match="576 visual tokens are not a whole number of images"):
        LLAVA.grids_of(config, [[(7, 576)]], {})


def test_families_are_found_by_type_and_name() -> None:
    assert family_of(LlavaConfig()) is LLAVA and family_named("llava") is LLAVA
    with pytest.raises(ModelError, match="'llama' are not supported"):
        family_of(LlamaConfig())
    with pytest.raises(ModelError, match="Unknown model family 'lava'") as caught:
        family_named("lava")
    assert "Did you mean 'llava'" in caught.value.remedy


def test_other_text_decoders_are_refused() -> None:
    assert LLAVA.backbone(LlavaConfig(text_config=tiny.text_config("qwen2"))).query == "q_proj"
    with pytest.raises(ModelError, match="text decoder 'phi3' is not supported"):
        LLAVA.backbone(LlavaConfig(text_config={"model_type": "phi3"}))


def test_family_names_and_aliases_are_unique() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert len(ALIASES) == sum(len(family.aliases) for family in FAMILIES)


@pytest.mark.parametrize("layout", ["hub", "modules"])
def test_decoder_keys_are_found_in_both_layouts(mha: Subject, layout: str) -> None:
    names = {"modules": "model.language_model.", "hub": "language_model.model."}
    decoder = [
        names[layout] + name
        for name, _ in mha.model.get_decoder().named_parameters()
        if name.startswith("layers.")
    ]
    others = [name for name in mha.model.state_dict() if ".language_model.layers." not in name]
    found = [DECODER_KEY.match(name) for name in decoder]
    assert all(found) and {int(match[1]) for match in found} == set(range(4))
    assert found[0][2] == "self_attn.q_proj.weight"
    assert not any(DECODER_KEY.match(name) for name in others)
    assert not DECODER_KEY.match("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight")


def test_names_resolve_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    alias = resolve("llava-1.5-7b")
    assert alias.location == "llava-hf/llava-1.5-7b-hf" and not alias.is_local
    (tmp_path / "llava-1.5-7b").mkdir()
    assert resolve("llava-1.5-7b") == alias  # an empty directory is no checkpoint
    (tmp_path / "llava-1.5-7b" / "config.json").touch()
    assert resolve("llava-1.5-7b").is_local
    assert resolve("llava-tiny").is_local and resolve("llava-tiny").name == "llava-tiny"
    local = resolve(str(tmp_path / "mine"))
    assert local.is_local and local.name == "mine"  # plans name no machine path
    assert resolve("mine").is_local and resolve("mine").name == "mine"
    hub = resolve("org/model@v2")
    assert (hub.name, hub.location, hub.revision) == ("org/model@v2", "org/model", "v2")
    assert resolve("org/model").revision is None


@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        ("llava-1.5-7", "Unknown model 'llava-1.5-7'", "llava-1.5-7b"),
        ("./nothing", "no such model directory", "alias"),
        ("/nothing/here", "no such model directory", "alias"),
        ("a/b/c", "no such model directory", "alias"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str, remedy: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        resolve(name)
    assert remedy in caught.value.remedy


def test_a_fingerprint_depends_on_the_weights_not_the_object(subject: Subject) -> None:
    again = tiny.llava(subject.identity.name.removeprefix("tiny-"))
    expected = subject.identity.fingerprint
    assert fingerprint_of_decoder(again.get_decoder()) == expected
    assert fingerprint_of_decoder(again.to(torch.bfloat16).get_decoder()) == expected
    assert fingerprint_of_decoder(subject.oracle.get_decoder()) == expected


@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
def test_a_fingerprint_changes_with_any_sampled_tensor(mha: Subject, place: tuple) -> None:
    for name, _ in mha.model.get_decoder().named_parameters():
        if not name.startswith("layers."):
            continue
        decoder = tiny.llava("mha").get_decoder()
        with torch.no_grad():
            weight = decoder.get_parameter(name)
            weight[place[: weight.dim()]] += 1.0
        assert fingerprint_of_decoder(decoder) != mha.identity.fingerprint, name


def test_a_digest_covers_names_shapes_and_values_in_any_order() -> None:
    values = sample(torch.arange(12.0).reshape(3, 4))
    entries = [("a", (3, 4), values), ("b", (3, 4), values)]
    expected = digest(entries)
    assert digest(reversed(entries)) == expected
    assert digest([("a", (4, 3), values), entries[1]]) != expected
    assert digest([("c", (3, 4), values), entries[1]]) != expected
    assert digest([("a", (3, 4), values + 1), entries[1]]) != expected
    assert values.tolist() == [0.0, 1.0, 2.0, 3.0, 8.0, 9.0, 10.0, 11.0]
