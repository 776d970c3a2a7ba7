"""A converted checkpoint is the original model in numbers, names and files; others are refused."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original import CONTEXT, DECODERS, END, SIDE, TILE, Original, raw_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLForConditionalGeneration,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from yopo.checkpoint.headers import read_shard
from yopo.checkpoint.reader import Checkpoint, fetch
from yopo.conversion.config_json import translate
from yopo.conversion.internvl import convert, expected_tensors
from yopo.conversion.tensors import new_tensors, rules_of, write_shard
from yopo.models.registry import resolve
from yopo.serving.loading import load_dense
from yopo.support.errors import CheckpointError, ModelError, OutputError

LENGTHS = {"short": 10, "beyond": 290}
"""Text after the images: within the trained positions, and beyond them (RoPE scaling)."""


def load(path: Path) -> InternVLForConditionalGeneration:
    """Load in float64 throughout; no weight may be missing, invented or left over."""
    model, report = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float64, output_loading_info=True
    )
    assert type(model) is InternVLForConditionalGeneration
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):  # those of transformers round to float32
                norm = nn.RMSNorm(child.weight.shape[0], child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.eval()


def prompt(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of two tiles and some text, and the tiles' pixels."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, 80, (1, length), generator=generator)
    tiles = torch.full((1, 2 * SIDE**2), CONTEXT)
    ids = torch.cat([text[:, :4], tiles, text[:, 4:]], dim=1)
    return ids, torch.randn(2, 3, TILE, TILE, generator=generator)


CASES = [(decoder, "vit-300m") for decoder in DECODERS] + [("internlm2", "vit-6b")]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("decoder", "vision"), CASES)
@torch.no_grad()
def test_logits_match_the_original_formulas(
    decoder: str, vision: str, length: str, tmp_path: Path
) -> None:
    original = Original.make(decoder, vision)
    original.save(tmp_path / "source", sharded=length == "short")
    convert(tmp_path / "source", tmp_path / "out")
    model = load(tmp_path / "out")
    ids, pixels = prompt(LENGTHS[length])
    found = model(input_ids=ids, pixel_values=pixels.double()).logits
    expected = original.logits(ids, pixels)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()  # angles are float32
    # The tolerance is meaningful: one head in another place is far outside it.
    with torch.no_grad():
        weight = model.get_decoder().layers[0].self_attn.o_proj.weight
        weight[:, :16] = weight[:, :16].roll(8, dims=1)
    moved = model(input_ids=ids, pixel_values=pixels.double()).logits
    assert (moved - expected).abs().max() > 1e-3 * expected.abs().max()


def test_linear_rope_scaling_is_converted(tmp_path: Path) -> None:
    original = Original.make()
    original.config["llm_config"]["rope_scaling"] = {"type": "linear", "factor": 4.0}
    convert(original.save(tmp_path / "source"), tmp_path / "out")
    ids, pixels = prompt(20)
    with torch.no_grad():
        found = load(tmp_path / "out")(input_ids=ids, pixel_values=pixels.double()).logits
    expected = original.logits(ids, pixels)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("has_head", [True, False])
def test_tied_embeddings_stay_tied(has_head: bool, tmp_path: Path) -> None:
    original = Original.make("qwen2")
    original.config["llm_config"]["tie_word_embeddings"] = True
    if not has_head:
        del original.tensors["language_model.lm_head.weight"]
    convert(original.save(tmp_path / "source"), tmp_path / "out")
    ids, pixels = prompt(20)
    with torch.no_grad():
        found = load(tmp_path / "out")(input_ids=ids, pixel_values=pixels.double()).logits
    expected = original.logits(ids, pixels)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("sharded", [True, False])
def test_values_and_dtypes_are_kept_bit_for_bit(sharded: bool, tmp_path: Path) -> None:
    original = Original.make()
    source = original.save(tmp_path / "source", sharded=sharded, dtype=torch.bfloat16)
    done = convert(source, tmp_path / "out")
    made = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        made |= load_file(path)
    assert len(made) == done.num_tensors
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in made.values()) == sum(
        tensor.numel() for tensor in original.tensors.values()
    )
    fused = original.tensors["language_model.model.layers.1.attention.wqkv.weight"].bfloat16()
    fused = fused.view(2, 4, 8, 32)
    layer = "language_model.model.layers.1.self_attn."
    assert torch.equal(made[layer + "q_proj.weight"], fused[:, :2].reshape(-1, 32))
    assert torch.equal(made[layer + "k_proj.weight"], fused[:, 2].reshape(-1, 32))
    assert torch.equal(made[layer + "v_proj.weight"], fused[:, 3].reshape(-1, 32))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == sharded
    checkpoint = Checkpoint.open(tmp_path / "out")  # and yopo itself takes it
    assert checkpoint.family.name == "internvl" and checkpoint.is_indexed == sharded


def test_companion_files_are_converted(tmp_path: Path) -> None:
    source = Original.make("phi3").save(tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 92]}')
    done = convert(source, tmp_path / "out")
    out = done.output
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.model", "added_tokens.json", "README.md", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith(".py")]
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["InternVLForConditionalGeneration"]
    assert config["image_token_id"] == CONTEXT and config["image_seq_length"] == SIDE**2
    assert config["dtype"] == "float32" and "auto_map" not in config
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [END + 1, 7]  # <|end|> first, each once
    tokens = json.loads((out / "tokenizer_config.json").read_text())["extra_special_tokens"]
    assert tokens["context_image_token"] == "<IMG_CONTEXT>"
    assert any("tokenizer.json" in note for note in done.notes)
    assert any("Rope scaling 'su'" in note for note in done.notes)


def test_the_image_processor_cuts_tiles(tmp_path: Path) -> None:
    from PIL import Image

    convert(Original.make().save(tmp_path / "source"), tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    made = processor([Image.new("RGB", (100, 50))], return_tensors="pt")
    assert made["pixel_values"].shape[1:] == (3, TILE, TILE)
    assert made["num_patches"].tolist() == [len(made["pixel_values"])]
    assert len(made["pixel_values"]) == 2 * 1 * 4 + 1  # 4 x 2 tiles of at most 12, a thumbnail


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (
            "internlm2",
            "<|im_start|>system\nBe.<|im_end|><|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            "llama",
            "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        ("phi3", "<|system|>\nBe.<|end|><|user|>\n<IMG_CONTEXT>\nWhat?<|end|><|assistant|>\n"),
    ],
)
def test_the_chat_template_is_the_originals(decoder: str, expected: str, tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    convert(Original.make(decoder).save(tmp_path / "source"), tmp_path / "out")
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    talk = [{"role": "system", "content": "Be."}, {"role": "user", "content": content}]
    (found,), _ = render_jinja_template([talk], chat_template=template, add_generation_prompt=True)
    assert found == expected


def test_only_one_piece_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yopo.conversion.tensors.CHUNK", 2**16)
    names = [f"language_model.model.layers.{number}.attention.wqkv.weight" for number in range(3)]
    save_file({name: torch.randn(512, 1024) for name in names}, tmp_path / "old")
    shard = read_shard(tmp_path / "old")
    text = {"num_key_value_heads": 2, "num_attention_heads": 4}
    made = new_tensors(shard, rules_of("InternLM2ForCausalLM", text))
    tracemalloc.start()
    try:
        assert len(list(write_shard(tmp_path / "old", tmp_path / "new", made))) == 9
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**18 < shard.tensors[0].num_bytes
    assert (tmp_path / "new").stat().st_size > shard.tensors[0].num_bytes * 3


Edit = Callable[[Original], Any]


def outer(**values: Any) -> Edit:
    return lambda original: original.config.update(values)


def inner(section: str, **values: Any) -> Edit:
    return lambda original: original.config[section].update(values)


def drop(section: str | None, key: str) -> Edit:
    return lambda original: (original.config[section] if section else original.config).pop(key)


def scaling(**values: Any) -> Edit:
    return inner("llm_config", rope_scaling=values)


def tensor(name: str, *shape: int) -> Edit:
    return lambda original: original.tensors.update({name: torch.zeros(shape)})


def lost(name: str) -> Edit:
    return lambda original: original.tensors.pop(name)


LAYER = "language_model.model.layers.0."


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (outer(ps_version="v1"), "ps_version is 'v1', which cannot be converted"),
        (drop(None, "ps_version"), "lacks 'ps_version'"),
        (outer(select_layer=-2), "select_layer is -2"),
        (outer(pad2square=True), "pad2square is True"),
        (outer(use_llm_lora=16), "use_llm_lora is 16"),
        (outer(force_image_size=48), "force_image_size is 48"),
        (outer(downsample_ratio=0.4), "cannot be shuffled by downsample_ratio 0.4"),
        (outer(novel=1), "the outer part.novel is unknown"),
        (outer(template="novel"), "conversation template 'novel' is unknown"),
        (outer(model_type="internvl"), "not an original InternVL checkpoint"),
        (inner("llm_config", architectures=["Novel"]), "the text decoder Novel cannot"),
        (inner("llm_config", novel=1), "llm_config.novel is unknown"),
        (inner("llm_config", rope_pos_id_version="v2pe"), "rope_pos_id_version is 'v2pe'"),
        (inner("llm_config", pruned_heads={"0": [1]}), "pruned_heads is"),
        (inner("llm_config", quantization_config={}), "quantization_config"),
        (inner("llm_config", num_key_value_heads=4), "would have shape|expected rows"),
        (drop("llm_config", "bias"), "llm_config lacks 'bias'"),
        (scaling(type="yarn", factor=2.0), "rope_scaling is of type yarn"),
        (scaling(type="dynamic", rope_type="linear", factor=2.0), "of type dynamic and linear"),
        (scaling(type="dynamic", factor=2.0, novel=1), "rope_scaling has the keys"),
        (scaling(type="dynamic"), "rope_scaling has the keys"),
        (inner("vision_config", norm_type="novel"), "norm_type is 'novel'"),
        (inner("vision_config", use_moe=True), "use_moe is True"),
        (inner("vision_config", novel=1), "vision_config.novel is unknown"),
        (
            inner("vision_config", qk_normalization=True, layer_norm_eps=1e-5),
            "layer_norm_eps is 1e-05",
        ),
        (inner("vision_config", qk_normalization=True), "has no tensor for 'vision_tower"),
        (tensor("novel.weight", 3), "tensor 'novel.weight' is not part of a known"),
        (tensor(LAYER + "attention.lora_A.weight", 3), "is not part of a known"),
        (tensor("vision_model.encoder.layers.7.ls1", 16), "has 'vision_tower.encoder.layer.7"),
        (tensor(LAYER + "attention.wqkv.weight", 63, 32), "expected rows of 2 x 4 heads"),
        (tensor(LAYER + "ffn_norm.weight", 31), "would have shape .31,., expected .32,."),
        (lost(LAYER + "feed_forward.w2.weight"), "has no tensor for .*mlp.down_proj"),
    ],
)
def test_unknown_originals_are_refused(edit: Edit, match: str, tmp_path: Path) -> None:
    original = Original.make()
    edit(original)
    source = original.save(tmp_path / "source")
    with pytest.raises(CheckpointError, match=match):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


VIT_300M = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
VIT_6B = {"hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25}
LLM_KEYS = "hidden_size intermediate_size num_hidden_layers num_attention_heads "
LLM_KEYS += "num_key_value_heads vocab_size max_position_embeddings rope_theta"
FULL_SIZE = [
    ("phi3", "vit-300m", VIT_300M, 24, (3072, 8192, 32, 32, 32, 32020, 131072, 1e4), 4.15),
    ("internlm2", "vit-300m", VIT_300M, 24, (4096, 14336, 32, 32, 8, 92553, 32768, 1e6), 8.08),
    ("internlm2", "vit-6b", VIT_6B, 45, (6144, 16384, 48, 48, 8, 92553, 32768, 1e6), 25.51),
]
"""The dimensions of InternVL2-4B, -8B and -26B, and their parameters in billions."""


@pytest.mark.parametrize(("decoder", "vision", "tower", "layers", "llm", "billions"), FULL_SIZE)
def test_full_size_models_have_the_published_number_of_parameters(
    decoder: str, vision: str, tower: dict, layers: int, llm: tuple, billions: float
) -> None:
    raw = raw_config(decoder, vision) | {"force_image_size": 448}
    raw["vision_config"] |= {**tower, "num_hidden_layers": layers}
    raw["vision_config"] |= {"image_size": 448, "patch_size": 14}
    raw["llm_config"] |= dict(zip(LLM_KEYS.split(), llm, strict=True))
    if decoder == "phi3":
        factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
        raw["llm_config"] |= {"rope_scaling": {"type": "su", **factors}}
    keywords = translate(raw, 92546 if decoder == "internlm2" else 32013)
    assert keywords["image_seq_length"] == 256
    shapes = expected_tensors(InternVLConfig(**keywords))
    assert round(sum(map(math.prod, shapes.values())) / 1e9, 2) == billions


@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_rope_types_that_the_decoder_lacks_are_refused(kind: str, tmp_path: Path) -> None:
    original = Original.make(kind)
    original.config["llm_config"]["rope_scaling"] = {"type": "linear", "factor": 2.0}
    with pytest.raises(CheckpointError, match="of type linear, which cannot be converted"):
        convert(original.save(tmp_path / "source"), tmp_path / "out")


def test_the_placeholders_id_is_read_not_guessed(tmp_path: Path) -> None:
    source = Original.make().save(tmp_path / "source")
    (source / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 5, "content": "<IMG_CONTEXT>"}]})
    )
    with pytest.raises(CheckpointError, match=r"different ids \[5, 90\] for <IMG_CONTEXT>"):
        convert(source, tmp_path / "out")
    for name in ("tokenizer.json", "added_tokens.json"):
        (source / name).unlink()
    with pytest.raises(CheckpointError, match="do not give an id for <IMG_CONTEXT>"):
        convert(source, tmp_path / "out")


def test_a_failure_halfway_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    source = Original.make().save(tmp_path / "source")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("yopo.conversion.internvl.index_json", fail)
    monkeypatch.setattr("yopo.conversion.internvl.shutil.copyfile", fail)
    with pytest.raises(OutputError, match="disk full"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(OutputError, match="is the source checkpoint itself"):
        convert(source, source)


def test_loading_an_original_suggests_converting_it(tmp_path: Path) -> None:
    source = Original.make().save(tmp_path / "source")
    with pytest.raises(ModelError, match="is an original internvl checkpoint") as caught:
        load_dense(resolve(str(source)))
    assert caught.value.remedy == f"Convert it first: yopo convert {source} DIRECTORY."


def test_hub_originals_are_refused_before_their_weights_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Original.make().save(tmp_path / "source")
    asked = []

    def download(repository: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append((repository, allow_patterns))
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelError, match="internvl2-8b: is an original") as caught:
        fetch(resolve("internvl2-8b"))
    assert "yopo convert internvl2-8b" in caught.value.remedy
    assert asked == [("OpenGVLab/InternVL2-8B", ["config.json"])]
    assert fetch(resolve("internvl2-8b"), takes_original=True) == source
    assert "*.safetensors" in asked[-1][1]


def test_the_command_converts_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from yopo.cli.main import main

    source, out = Original.make().save(tmp_path / "source"), tmp_path / "out"
    assert main(["convert", str(source), str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "tensors written" in printed.err and "id 90" in printed.err
    assert main(["convert", str(source), str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(source), str(out), "--force", "-q"]) == 0
