"""Shared by tests of the command line: a tiny real LLaVA for demo pairs, and results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_training.build import PATCH_SIZE, build_processor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from yopo.demo.scenes import IMAGE_SIZE
from yopo.plans.file import read_document

LAYERS, HEADS, FFN = 3, 4, 40
transformers_logging.disable_progress_bar()  # `yopo` does, where it imports transformers itself

FAST = (
    *("--samples", 32, "--batch-size", 16, "--measure-pairs", 8, "--fit-pairs", 8),
    *("--max-new-tokens", 2),
)
"""A calibration that takes a second, on as few pairs as go without a warning."""


@dataclass(frozen=True)
class Run:
    """The result of one command line."""

    code: int
    out: str
    err: str

    @property
    def is_sentence(self) -> bool:
        """Whether it failed as a user should see it: one sentence on stderr and no result."""
        return (
            self.code == 1
            and self.out == ""
            and any(line.startswith("error: ") for line in self.err.splitlines()[-2:])
            and "Traceback" not in self.err
            and "unexpected" not in self.err
        )


DRAWINGS = ("--data", "demo:calibration")
"""Data for models that are no demo models, which none is drawn for."""

Yopo = Callable[..., Run]


def side_file(plan: Path) -> Path:
    """Return the path of a plan's tensors."""
    _, named = read_document(plan)
    assert named is not None
    return plan.with_name(named.file)


def save_model(path: Path, *, seed: int = 0, shard: str = "1GB") -> Path:
    """Save a LLaVA with random weights and the demo processor."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            initializer_range=0.2,
            **special,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    model.save_pretrained(path, max_shard_size=shard)
    processor.save_pretrained(path)
    return path
