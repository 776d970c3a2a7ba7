"""Processors are configured from the model if their directory lacks settings, as many do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from yopo.data.pairs import ImageRef, Pair
from yopo.data.prompts import encode_for, load_processor
from yopo.models.layout import LayoutProbe
from yopo.models.registry import family_of
from yopo.support.errors import ModelError

SIZE, PATCH = 14, 4
SIDE = SIZE // PATCH
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":", "what"]
PART = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = PART | {"image_size": SIZE, "patch_size": PATCH}
TEXT = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **PART)
FULL = {"vision_feature_select_strategy": "full"}
SQUARE = {"height": SIZE, "width": SIZE}
PINPOINTS = [[SIZE, 2 * SIZE]]


def llava(tower: PreTrainedConfig, **more: str) -> LlavaConfig:
    return LlavaConfig(vision_config=tower, text_config=TEXT, image_token_id=4, **more)


def llava_next(tower: PreTrainedConfig, **more: str) -> LlavaNextConfig:
    known = {"text_config": TEXT, "image_token_id": 4, "image_grid_pinpoints": PINPOINTS}
    return LlavaNextConfig(vision_config=tower, **known, **more)


CONFIGS = {
    "clip": llava(CLIPVisionConfig(**VISION)),
    "class token": llava(CLIPVisionConfig(**VISION), **FULL),
    "siglip": llava(SiglipVisionConfig(**VISION), **FULL),
    "next": llava_next(CLIPVisionConfig(**VISION)),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def make_processor(name: str, **settings: object) -> ProcessorMixin:
    if name == "next":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        )
        return LlavaNextProcessor(images, make_tokenizer(), **settings)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SQUARE)
    if name == "siglip":
        images = SiglipImageProcessorPil(size=SQUARE)
    return LlavaProcessor(images, make_tokenizer(), **settings)


def published(folder: Path, name: str, **images: object) -> Path:
    """Make a directory that has only preprocessor_config.json, tokenizer files and config.json."""
    make_processor(name).save_pretrained(folder)
    parts = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(parts["image_processor"] | images))
    CONFIGS[name].save_pretrained(folder)
    return folder


def build(config: PreTrainedConfig) -> torch.nn.Module:
    is_next = config.model_type == "llava_next"
    made = LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration
    return made(config).eval()


PAIRS = [
    Pair((ImageRef(Image.new("RGB", (30, 15), color), "p:1"),), "what", (), None, "0", "p:1")
    for color in ("red", "blue")
]


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_come_from_the_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    processor = load_processor(str(published(tmp_path, name)))
    strategy = "full" if name in ("siglip", "class token") else "default"
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (PATCH, strategy)
    assert processor.num_additional_image_tokens == (name != "siglip")
    assert f"values in config.json: patch_size {PATCH}, vision_feature" in capsys.readouterr().err
    model, seen = build(CONFIGS[name]), []
    family = family_of(model.config)
    probe = LayoutProbe(model.base_model, family.grids_of)
    model.get_decoder().register_forward_pre_hook(lambda *_: seen.append(probe.layout.grids))
    with torch.no_grad():
        model(**encode_for(model, processor, PAIRS).inputs)  # refuses another number of tokens
    probe.remove()
    sizes = [(grid.rows, grid.cols) for grid in seen[0][0]]
    square = (SIDE, SIDE)
    assert sizes == {"class token": [(1, 1), square], "next": [square, (SIDE, 2 * SIDE + 1)]}.get(
        name, [square]
    )


def test_a_named_processor_class_is_configured_too(tmp_path: Path) -> None:
    folder = published(tmp_path, "clip", processor_class="LlavaProcessor")
    assert load_processor(str(folder)).patch_size == PATCH


def test_a_wrong_setting_is_corrected_and_a_right_one_not_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
    for tokens, said in ((0, "num_additional_image_tokens 1."), (1, "")):
        folder = tmp_path / str(tokens)
        make_processor("clip", **settings, num_additional_image_tokens=tokens).save_pretrained(
            folder
        )
        CONFIGS["clip"].save_pretrained(folder)
        assert load_processor(str(folder)).num_additional_image_tokens == 1
        err = capsys.readouterr().err
        assert err.endswith(f"{said}\n") if said else err == ""


def test_settings_that_cannot_be_determined_are_refused(tmp_path: Path) -> None:
    folder = published(tmp_path, "clip", processor_class="LlavaProcessor")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="there is no config.json of a supported model") as caught:
        load_processor(str(folder))
    assert "patch_size" in caught.value.message and "config.json" in caught.value.remedy


REFUSED = {
    "the vision tower 'dinov2' is not supported: the layout of its tokens": llava(
        Dinov2Config(**PART)
    ),
    "'siglip_vision_model' has no class token, but": llava(SiglipVisionConfig(**VISION)),
    "'pixtral' has no class token, but": llava(PixtralVisionConfig(**VISION)),
    "every tile of clip_vision_model also has a class token": llava_next(
        CLIPVisionConfig(**VISION), **FULL
    ),
    "LLaVA-NeXT needs tiles of one size": llava_next(PixtralVisionConfig(**VISION), **FULL),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_towers_that_cannot_be_located_are_refused_before_the_model_is_loaded(
    reason: str, tmp_path: Path
) -> None:
    folder = published(tmp_path, "clip")
    REFUSED[reason].save_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        load_processor(str(folder))
    assert reason in caught.value.message and "\n" not in caught.value.message


def test_a_pixtral_batch_without_sizes_is_refused() -> None:
    config = llava(PixtralVisionConfig(**VISION), **FULL)
    with pytest.raises(ModelError, match="needs the sizes of its images"):
        family_of(config).grids_of(config, [[(4, 9)]], {})
