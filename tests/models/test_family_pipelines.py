"""From pairs to a pruned model, with the real processors of families that no demo model covers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
import zoo_idefics3
import zoo_llava_onevision
import zoo_mistral3
from demo_training.build import build_processor
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    PixtralImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.utils import logging

import yopo
from yopo.cli.main import main
from yopo.data.prompts import load_processor
from yopo.models.processors import image_class
from yopo.models.registry import family_of
from yopo.plans.grid import Grid
from yopo.plans.storage import read_plan

FAST = ("--samples", 16, "--batch-size", 3, "--measure-pairs", 8, "--max-new-tokens", 2)
DEMO = build_processor()


def tokenizer_with(*added: str) -> PreTrainedTokenizerFast:
    """Return the demo's tokenizer with a family's own tokens."""
    tokenizer = build_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


def onevision() -> ProcessorMixin:
    tile = zoo_llava_onevision.TILE
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": tile, "width": tile}, image_grid_pinpoints=zoo_llava_onevision.PINPOINTS
    )
    return image_class(transformers.LlavaOnevisionProcessor)(
        images,
        tokenizer_with("<video>"),
        num_image_tokens=zoo_llava_onevision.SIDE**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{zoo_llava_onevision.MOST_TILES}",
        chat_template=DEMO.chat_template,
    )


def cropping(prefix: str) -> ProcessorMixin:
    crop = zoo_idefics3.CROP
    images = getattr(transformers, f"{prefix}ImageProcessorPil")(
        size={"longest_edge": 3 * crop}, max_image_size={"longest_edge": crop}
    )
    tags = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    tokenizer = tokenizer_with("<fake_token_around_image>", "<global-img>", "\n", *tags)
    stock = getattr(transformers, f"{prefix}Processor")
    made = stock if prefix == "Idefics3" else image_class(stock)
    side = zoo_idefics3.SIDE
    return made(images, tokenizer, image_seq_len=side**2, chat_template=DEMO.chat_template)


MAKERS: dict[str, Callable[[], ProcessorMixin]] = {
    "llava-onevision": onevision,
    "idefics3": lambda: cropping("Idefics3"),
    "smolvlm": lambda: cropping("SmolVLM"),
}
ENTRIES = {
    entry.name: entry
    for module in (zoo_idefics3, zoo_llava_onevision, zoo_mistral3)
    for entry in module.ENTRIES
}


def save_model(name: str, tokenizer: PreTrainedTokenizerFast, path: Path) -> PreTrainedConfig:
    """Save a zoo model with a tokenizer's vocabulary."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = ENTRIES[name].build().config
    text = config.get_text_config()
    text.vocab_size = len(tokenizer)
    for token in ("pad", "bos", "eos"):
        setattr(text, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    if hasattr(config, "video_token_id"):
        config.video_token_id = tokenizer.convert_tokens_to_ids("<video>")
    model = AutoModelForImageTextToText.from_config(config)
    # Random weights might generate the placeholder, for which stock models then miss an image.
    model.generation_config.suppress_tokens = [config.image_token_id]
    model.save_pretrained(path)
    return config


def run(*arguments: object) -> None:
    assert main([str(each) for each in ("-q", *arguments)]) == 0


def check_served(inputs: dict[str, Any]) -> None:
    """The pruned model answers, and otherwise than the original, which stock transformers loads."""
    pruned, dense = yopo.load("tiny-yopo"), AutoModelForImageTextToText.from_pretrained("tiny")
    stock = AutoModelForImageTextToText.from_pretrained("tiny-yopo")
    with torch.no_grad():
        found, usual, same = (each(**inputs).logits[:, -1] for each in (pruned, dense, stock))
    assert found.isfinite().all() and not torch.allclose(found, usual, atol=1e-4)
    torch.testing.assert_close(same, usual, rtol=1e-3, atol=1e-4)
    said = pruned.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("name", MAKERS)
def test_a_calibrated_plan_can_be_applied_and_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("SmolVLM's processor needs num2words")
    monkeypatch.chdir(tmp_path)
    tiny.try_few_plans(monkeypatch)
    monkeypatch.setenv("YOPO_CACHE", str(tmp_path / "cache"))
    try:
        made = MAKERS[name]()
    except ImportError as error:  # before transformers 5.18, its Pillow half wanted it as well
        if "Torchvision" not in str(error):
            raise
        pytest.skip("this transformers builds the processor only with torchvision")
    save_model(name, made.tokenizer, tmp_path / "tiny")
    made.save_pretrained(tmp_path / "tiny")
    run("calibrate", "--model", "tiny", "--data", "demo:calibration", *FAST, "--budget", 0.5)
    plan = read_plan("plan.yaml")
    assert len(plan.workload.grids) > 1 and plan.model.family == name.replace("-", "_")
    run("apply", "plan.yaml", "--verify")
    run("eval", "tiny-yopo", "--data", "demo:heldout", *FAST[:4], "--timing-runs", 0)
    run("bench", "tiny-yopo", "--runs", 1, "--decode-steps", 1, "--device", "cpu")
    processor = load_processor("tiny-yopo")
    images = [Image.new("RGB", size, (200, 10, 10)) for size in ((60, 30), (16, 90), (30, 30))]
    texts = ["USER: <image> what is this ? ASSISTANT:", "USER: <image> <image> what ? ASSISTANT:"]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs = processor(text=texts, images=[images[:1], images[1:]], **options)
    check_served(dict(inputs))


class WritesRows(ProcessorMixin):
    """Writes prompts as Mistral's processor does, which cannot be imported without torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = "<image>"
        self.patch_size, self.spatial_merge_size = zoo_mistral3.PATCH, zoo_mistral3.MERGE

    def __call__(
        self, text: list[str], images: list[list[Image.Image]], **options: Any
    ) -> dict[str, Any]:
        side = self.patch_size * self.spatial_merge_size
        flat = [image for each in images for image in each]
        made = self.image_processor(flat, patch_size=side, return_tensors="pt")
        sizes = iter(torch.as_tensor(made["image_sizes"]).tolist())
        written = []
        for prompt in text:
            head, *parts = prompt.split(self.image_token)
            for part in parts:
                high, wide = (length // side for length in next(sizes))
                rows = " <break> ".join(["<image> " * wide] * high)
                head += f"{rows} <end> {part}"
            written.append(head)
        made = dict(made) | dict(
            self.tokenizer(written, return_tensors="pt", **options["text_kwargs"])
        )
        made["image_sizes"] = torch.as_tensor(made["image_sizes"])
        return {name: value for name, value in made.items() if name != "token_type_ids"}


def test_mistral3_is_calibrated_and_served_with_break_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.try_few_plans(monkeypatch)
    side = zoo_mistral3.PATCH * zoo_mistral3.MERGE
    images = PixtralImageProcessorPil(size={"longest_edge": 8 * side}, patch_size=side)
    processor = WritesRows(images, tokenizer_with("<break>", "<end>"), DEMO.chat_template)
    config = save_model("mistral3", processor.tokenizer, tmp_path / "tiny")
    model = AutoModelForImageTextToText.from_pretrained("tiny")
    sizes = ((48, 40), (64, 32), (24, 64))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(32):
        high, wide = sizes[number % 3]
        pixels = torch.randint(256, (high, wide, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        rows.append({"image": image, "question": "how many circles are there ?"})
    options = yopo.RunOptions(data=rows, batch_size=4, max_new_tokens=2)
    found = yopo.calibrate(model, 0.5, processor=processor, options=options)
    workload = found.plan.workload
    assert workload.row_ends == 1 and workload.grids[0] in (Grid(6, 5), Grid(8, 4), Grid(3, 8))
    yopo.apply(found.plan, model="tiny", output="tiny-yopo")
    settings = family_of(config).processor_settings(config)
    assert settings == {"patch_size": zoo_mistral3.PATCH, "spatial_merge_size": 2}
    text = ["USER: <image> what is this ? ASSISTANT:"] * 2
    shown = [[rows[0]["image"]], [rows[1]["image"]]]
    check_served(processor(text, shown, text_kwargs={"padding": True, "padding_side": "left"}))
