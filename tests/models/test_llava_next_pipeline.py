"""LLaVA-NeXT from calibration to a pruned model, with its real processor and anyres tiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from demo_training.build import build_processor
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
)
from transformers.utils import logging
from zoo import TEXT
from zoo_llava_next import PATCH, PINPOINTS, TILE

import yopo
from yopo.cli.main import main
from yopo.data.prompts import load_processor
from yopo.plans.storage import read_plan

FAST = ("--samples", 16, "--batch-size", 3, "--measure-pairs", 8, "--max-new-tokens", 2)


def save_model(path: Path) -> None:
    logging.disable_progress_bar()
    demo = build_processor()
    square = {"height": TILE, "width": TILE}
    images = LlavaNextImageProcessorPil(
        size=square, crop_size=square, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        images,
        demo.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=demo.chat_template,
    )
    special = {
        "vocab_size": len(demo.tokenizer),
        "pad_token_id": demo.tokenizer.pad_token_id,
        "bos_token_id": demo.tokenizer.bos_token_id,
        "eos_token_id": demo.tokenizer.eos_token_id,
    }
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**tower, num_hidden_layers=2, image_size=TILE, patch_size=PATCH)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=MistralConfig(**TEXT | special),
        image_token_id=demo.tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    # Random weights might generate the placeholder, for which stock models then miss an image.
    model.generation_config.suppress_tokens = [config.image_token_id]
    model.save_pretrained(path)
    processor.save_pretrained(path)


def test_a_calibrated_plan_can_be_applied_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.try_few_plans(monkeypatch)
    monkeypatch.setenv("YOPO_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "tiny")

    def run(*arguments: object) -> None:
        assert main([str(each) for each in ("-q", *arguments)]) == 0

    run("calibrate", "--model", "tiny", "--data", "demo:calibration", *FAST, "--budget", 0.5)
    grids = read_plan("plan.yaml").workload.grids
    assert len(grids) == 2 and grids[0].rows == grids[0].cols == TILE // PATCH
    run("apply", "plan.yaml", "--verify")
    run("eval", "tiny-yopo", "--data", "demo:heldout", *FAST[:4], "--timing-runs", 0)
    processor = load_processor("tiny-yopo")
    images = [Image.new("RGB", size, (200, 10, 10)) for size in ((60, 30), (16, 90))]
    texts = ["USER: <image> what is this ? ASSISTANT:", "USER: <image> what ? ASSISTANT:"]
    options = {"padding": True, "return_tensors": "pt"}
    inputs = processor(text=texts, images=[[image] for image in images], **options)
    pruned, dense = yopo.load("tiny-yopo"), AutoModelForImageTextToText.from_pretrained("tiny")
    with torch.no_grad():
        found, usual = (model(**inputs).logits[:, -1] for model in (pruned, dense))
    assert found.isfinite().all() and not torch.allclose(found, usual, atol=1e-4)
