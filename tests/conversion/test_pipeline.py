"""The command line leads from an original InternVL2 to a pruned model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from original import CONTEXT, END, Original
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

import yopo
from yopo.cli.main import main
from yopo.data.prompts import load_processor

SPECIAL = {
    CONTEXT: "<IMG_CONTEXT>",
    END: "<|im_end|>",
    END + 1: "<|end|>",
    93: "<img>",
    94: "</img>",
}
FAST = ("--samples", 16, "--batch-size", 3, "--measure-pairs", 8, "--max-new-tokens", 2)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json whose special tokens have the checkpoint's ids."""
    words = {"<unk>": 0, "</s>": 2, **{f"w{index}": index for index in range(3, 96)}, "<s>": 1}
    for index, token in SPECIAL.items():
        del words[f"w{index}"]
        words[token] = index
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="</s>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL.values()),
    ).save_pretrained(folder)


def run(*arguments: object) -> None:
    assert main([str(each) for each in ("-q", *arguments)]) == 0


@pytest.mark.parametrize("decoder", ["internlm2", "phi3"])
def test_an_original_can_be_converted_calibrated_applied_and_loaded(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.try_few_plans(monkeypatch)
    monkeypatch.setenv("YOPO_CACHE", str(tmp_path / "cache"))
    source = Original.make(decoder).save(tmp_path / "source")
    write_tokenizer(source)
    # Random weights might generate the placeholder, for which stock models then miss an image.
    (source / "generation_config.json").write_text(json.dumps({"suppress_tokens": [CONTEXT]}))
    run("convert", source, "native")
    processor = load_processor("native")
    assert type(processor).__name__ == "InternVLProcessor" and processor.image_token_id == CONTEXT
    run("calibrate", "--model", "native", "--data", "demo:calibration", *FAST, "--budget", 0.5)
    run("inspect", "plan.yaml", "--json")
    run("apply", "plan.yaml", "--verify")
    run("eval", "native-yopo", "--data", "demo:heldout", *FAST[:4], "--timing-runs", 0)
    image = Image.new("RGB", (60, 30), (200, 10, 10))
    inputs = processor(text="<IMG_CONTEXT> w5 w6", images=[image], return_tensors="pt")
    dense = AutoModelForImageTextToText.from_pretrained("native-yopo")
    with torch.no_grad():
        found, usual = (
            model(**inputs).logits[0, -1] for model in (yopo.load("native-yopo"), dense)
        )
    assert found.isfinite().all() and not torch.allclose(found, usual, atol=1e-4)
