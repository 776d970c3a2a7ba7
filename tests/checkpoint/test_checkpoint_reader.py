"""A sound checkpoint can be read; anything unsound is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from yopo.checkpoint.reader import INDEX_FILE, Checkpoint, fetch, fingerprint, read_source
from yopo.models.fingerprint import fingerprint_of_decoder, is_same, remember_source
from yopo.models.registry import ModelSource
from yopo.support.errors import CheckpointError, ModelError

LAYOUTS = [(hub, sharded) for hub in (True, False) for sharded in (True, False)]


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    """A copy of a sharded checkpoint, to break."""
    return Path(shutil.copytree(saved().path, tmp_path / "model"))


@pytest.fixture
def single(saved, tmp_path) -> Path:
    """A copy of a checkpoint in one file, to break."""
    return Path(shutil.copytree(saved(sharded=False).path, tmp_path / "model"))


def edit_json(path: Path, edit) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def failure(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    return caught.value


@pytest.mark.parametrize(("hub_layout", "sharded"), LAYOUTS)
def test_the_reader_lists_every_tensor_as_safetensors_does(saved, hub_layout, sharded) -> None:
    checkpoint = Checkpoint.open(saved(hub_layout=hub_layout, sharded=sharded).path)
    assert (len(checkpoint.shards) > 1) == sharded == checkpoint.is_indexed
    seen = 0
    for shard in checkpoint.shards:
        content = (checkpoint.path / shard.file).read_bytes()
        with safe_open(checkpoint.path / shard.file, "pt") as file:
            assert set(file.keys()) == {entry.name for entry in shard.tensors}
            for entry in shard.tensors:
                tensor = file.get_tensor(entry.name)
                assert entry.shape == tuple(tensor.shape)
                assert content[entry.start : entry.stop] == tensor.numpy().tobytes()
                seen += 1
    assert seen == len(checkpoint.tensors)
    assert len(checkpoint.decoder) == 3 * 9


@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen2"])
@pytest.mark.parametrize(("hub_layout", "sharded"), LAYOUTS)
def test_the_fingerprint_equals_the_loaded_models(saved, kind, hub_layout, sharded) -> None:
    source = saved(kind, hub_layout=hub_layout, sharded=sharded)
    expected = fingerprint_of_decoder(source.model.get_decoder())
    found = fingerprint(Checkpoint.open(source.path))
    assert is_same(found, expected) and found.startswith(expected)


def test_the_fingerprint_survives_loading_in_another_dtype(saved) -> None:
    source = saved(dtype=torch.bfloat16)
    model = AutoModelForImageTextToText.from_pretrained(source.path, dtype=torch.float32)
    found = fingerprint(Checkpoint.open(source.path))
    assert is_same(found, fingerprint_of_decoder(model.get_decoder()))


def test_the_fingerprint_depends_on_weights_not_on_layout(saved) -> None:
    layouts = [saved(hub_layout=hub, sharded=sharded).path for hub, sharded in LAYOUTS]
    assert len({fingerprint(Checkpoint.open(path)) for path in layouts}) == 1


def inner_rows(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Change all values except those in a matrix's first and last row."""

    def change(tensors):
        tensors[name][1:-1] += 1

    return change


@pytest.mark.parametrize(
    "name",
    [
        "multi_modal_projector.linear_1.weight",
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.mlp.down_proj.weight",
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
    ],
)
def test_the_fingerprint_covers_every_tensor_and_its_inner_rows(single, name) -> None:
    before = fingerprint(Checkpoint.open(single))
    edit_tensors(single, inner_rows(name))
    after = fingerprint(Checkpoint.open(single))
    assert not is_same(before, after)
    decoders = [each.partition("-")[0] for each in (before, after)]
    assert decoders[0] == decoders[1]  # what a plan of an earlier version has, and still matches
    assert is_same(decoders[0], after)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_decoder_matches_its_files_in_any_precision(saved, stored, loaded) -> None:
    checkpoint = Checkpoint.open(saved(dtype=stored).path)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.path, dtype=loaded)
    decoder = model.get_decoder()
    remember_source(decoder, read_source(checkpoint))
    assert fingerprint_of_decoder(decoder) == fingerprint(checkpoint)
    with torch.no_grad():
        decoder.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert not is_same(fingerprint_of_decoder(decoder), fingerprint(checkpoint))


def test_the_fingerprint_changes_with_a_weight(single) -> None:
    before = fingerprint(Checkpoint.open(single))

    def change(tensors):
        tensors["language_model.model.layers.1.mlp.down_proj.weight"][0, 0] += 1

    edit_tensors(single, change)
    assert fingerprint(Checkpoint.open(single)) != before


def test_leftover_buffers_do_not_change_the_fingerprint(single) -> None:
    before = fingerprint(Checkpoint.open(single))
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(single, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert fingerprint(Checkpoint.open(single)) == before


def test_a_missing_directory_is_refused(tmp_path) -> None:
    assert "no such checkpoint directory" in failure(tmp_path / "nothing").message


def test_a_missing_config_is_refused(sharded) -> None:
    (sharded / "config.json").unlink()
    assert "config.json: no such file" in failure(sharded).message


def test_an_invalid_config_is_refused(sharded) -> None:
    (sharded / "config.json").write_text("{")
    assert "config.json: is not valid JSON" in failure(sharded).message


def test_an_unknown_architecture_is_refused(sharded) -> None:
    edit_json(sharded / "config.json", lambda config: config.update(model_type="nonsense"))
    assert "transformers cannot read it" in failure(sharded).message


def test_an_unsupported_family_is_refused(sharded) -> None:
    (sharded / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="Models of type 'llama' are not supported"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("place", ["outer", "text_config"])
def test_a_quantized_checkpoint_is_refused(sharded, place) -> None:
    def quantize(config):
        part = config if place == "outer" else config["text_config"]
        part["quantization_config"] = {"quant_method": "awq"}

    edit_json(sharded / "config.json", quantize)
    error = failure(sharded)
    assert "its weights are quantized (awq)" in error.message
    assert "unquantized" in error.remedy


def test_an_adapter_checkpoint_is_refused(sharded) -> None:
    (sharded / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in failure(sharded).message


def test_a_checkpoint_of_pickles_is_refused(sharded) -> None:
    for path in [*sharded.glob("*.safetensors"), sharded / INDEX_FILE]:
        path.unlink()
    error = failure(sharded)
    assert "only pytorch_model.bin" in error.message
    assert "save_pretrained()" in error.remedy


def test_a_missing_shard_is_named(sharded) -> None:
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.unlink()
    error = failure(sharded)
    assert victim.name in error.message and "this shard is missing" in error.message
    assert "Download" in error.remedy


def test_an_index_without_a_weight_map_is_refused(sharded) -> None:
    edit_json(sharded / INDEX_FILE, lambda index: index.pop("weight_map"))
    assert "lacks the mapping 'weight_map'" in failure(sharded).message


def test_an_index_that_names_a_missing_tensor_is_refused(sharded) -> None:
    def invent(index):
        index["weight_map"]["invented.weight"] = next(iter(index["weight_map"].values()))

    edit_json(sharded / INDEX_FILE, invent)
    assert "lists tensor 'invented.weight' in model-0000" in failure(sharded).message


def test_an_index_that_leads_outside_the_folder_is_refused(sharded) -> None:
    edit_json(
        sharded / INDEX_FILE,
        lambda index: index["weight_map"].update({"x": "../model.safetensors"}),
    )
    assert "'../model.safetensors' is not a plain file name" in failure(sharded).message


def test_a_tensor_in_two_shards_is_refused(sharded) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second, metadata={"format": "pt"})
    assert f"tensor '{name}' is in two shards" in failure(sharded).message


@pytest.mark.parametrize(("change", "word"), [(-1, "shorter"), (1, "longer")])
def test_a_shard_of_the_wrong_length_is_refused(single, change, word) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"\0")
    message = failure(single).message
    assert f"is {word} than its header states (expected {len(data)} bytes" in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file has 0 bytes"),
        ((10**6).to_bytes(8, "little") + b"{}", "its header claims 1000000 bytes"),
        ((2).to_bytes(8, "little") + b"{]", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
)
def test_a_bad_header_is_refused(single, content, problem) -> None:
    (single / "model.safetensors").write_bytes(content)
    assert problem in failure(single).message


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"dtype": "F32", "shape": [2]}, "lacks dtype, shape or offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "claims 4 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "starts at"),
    ],
)
def test_a_bad_tensor_entry_is_refused(single, entry, problem) -> None:
    header = json.dumps({"x": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0" * 8
    (single / "model.safetensors").write_bytes(content)
    assert problem in failure(single).message


DOWN = "language_model.model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda t: t.pop(DOWN), "lacks mlp.down_proj.weight of decoder layer 1"),
        (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), "has shape (44, 32), expected (32"),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}), "has type I8, expected one of F64"),
        (
            lambda t: t.update({DOWN.replace("weight", "lora_A"): torch.ones(2)}),
            "is not a known part of a decoder layer",
        ),
        (lambda t: t.update({DOWN.replace(".1.", ".9."): t[DOWN] + 1}), "is from layer 9"),
        (lambda t: t.update({f"model.{DOWN}": t[DOWN] + 1}), "holds layer 1's mlp.down_proj"),
    ],
    ids=["missing", "shape", "dtype", "unknown", "beyond", "twice"],
)
def test_a_decoder_that_differs_from_its_config_is_refused(single, edit, problem) -> None:
    edit_tensors(single, edit)
    assert problem in failure(single).message


def test_fetching_a_local_model_gives_its_directory(tmp_path) -> None:
    assert fetch(ModelSource("m", str(tmp_path), None, is_local=True)) == tmp_path


def hub(repository: str) -> ModelSource:
    return ModelSource(repository, repository, None, is_local=False)


def test_fetching_offline_is_explained(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="org/not-here: .*hub cannot be reached") as caught:
        fetch(hub("org/not-here"))
    assert "HF_HUB_OFFLINE" in caught.value.remedy


def test_fetching_an_impossible_name_is_refused() -> None:
    with pytest.raises(ModelError, match="no such model on"):
        fetch(hub("org/--bad..name"))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("RepositoryNotFoundError", "no such model on"),
        ("RevisionNotFoundError", "no such revision on"),
        ("GatedRepoError", "is gated"),
        ("HfHubHTTPError", "cannot be reached"),
    ],
)
def test_fetching_explains_the_hubs_answers(monkeypatch, kind, problem) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, kind)

    def answer(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    with pytest.raises(ModelError, match=problem):
        fetch(hub("org/model"))


def test_fetching_reports_a_full_disk(monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match="cannot be downloaded: .*No space left"):
        fetch(hub("org/model"))
