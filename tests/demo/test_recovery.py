"""Recovery training on the demo model, end to end: prune, train, save, load, calibrate again."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat import user
from demo_training.rows import IGNORED
from torch import nn
from transformers import ProcessorMixin

import yopo
from yopo.calibration.measure import measure
from yopo.checkpoint.bake import bake
from yopo.data.prompts import batches, encode, load_processor
from yopo.data.sources import open_pairs
from yopo.demo import LLAVA_TINY
from yopo.demo.scenes import pairs
from yopo.fitting.fitter import Fitter
from yopo.models.registry import resolve
from yopo.planning.planner import make_plan
from yopo.planning.request import PaperRequest
from yopo.plans.schema import PruningPlan
from yopo.runtime import saved
from yopo.runtime.install import pruned
from yopo.serving.loading import load_dense

PAIRS = 16
SHAPE = {"head_ratio": 0.25, "neuron_ratio": 0.05, "visual_layers": 2, "radius": 1}
"""Visual tokens do next to nothing: there is something to recover."""


class Collate:
    """Turns pairs into a batch whose labels are the answers."""

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor

    def __call__(self, asked: Sequence[Any]) -> dict[str, torch.Tensor]:
        template = self.processor.apply_chat_template
        prompts = [template([user(p.image, p.question)], add_generation_prompt=True) for p in asked]
        answers = [f" {pair.answer}{self.processor.tokenizer.eos_token}" for pair in asked]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        images = [[pair.image] for pair in asked]
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        inputs = dict(self.processor(images=images, text=texts, **options))
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, answer in enumerate(answers):
            count = len(self.processor.tokenizer(answer, add_special_tokens=False).input_ids)
            labels[row, -count:] = inputs["input_ids"][row, -count:]
        return inputs | {"labels": labels}


@pytest.fixture(scope="module")
def collate() -> Collate:
    return Collate(load_processor(str(LLAVA_TINY)))


def calibrated(folder: Path, collate: Collate, request: PaperRequest) -> PruningPlan:
    """A plan for the model in a directory, fitted if the request says so."""
    processor, model = collate.processor, load_dense(resolve(str(folder)))
    shown = list(open_pairs("demo:calibration", samples=PAIRS, seed=0))
    statistics = measure(model, processor, shown, name="llava-tiny", batch_size=PAIRS)

    def encoded() -> list[Any]:
        token = model.config.image_token_id
        options = {"image_token_id": token, "device": "cpu", "dtype": model.dtype}
        return [encode(processor, group, **options) for group in batches(shown, PAIRS)]

    return make_plan(statistics, request, None, Fitter(model, encoded))[0]


@torch.no_grad()
def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    return model.eval()(**batch, use_cache=False).loss.item()


def example() -> str:
    """The code in the module's docstring."""
    text = saved.__doc__.partition("weights:\n\n")[2]
    return textwrap.dedent(text.partition("\n\nAn intermediate PEFT")[0])


def test_the_documented_recovery_works(
    collate: Collate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = calibrated(LLAVA_TINY, collate, PaperRequest(**SHAPE, compensation="refit"))
    bake(plan, LLAVA_TINY, "llava-tiny-yopo")
    unseen = collate(list(pairs("heldout", 24, seed=5)))
    before = loss(yopo.load("llava-tiny-yopo"), unseen)
    space = {"rows": list(pairs("train", 80, seed=1)), "collate": collate}
    exec(example(), space)
    trained, recovered = space["model"], space["recovered"]
    after, dense = loss(recovered, unseen), loss(load_dense(resolve(str(LLAVA_TINY))), unseen)
    print(f"loss on unseen pairs {before:.3f} -> {after:.3f} (dense {dense:.3f})")
    assert after < 0.7 * before

    live, again = (model.eval()(**unseen).logits for model in (trained, recovered))
    text = unseen["input_ids"] != trained.config.image_token_id
    torch.testing.assert_close(again[text], live[text], atol=1e-4, rtol=1e-4)
    found = yopo.load("llava-tiny-recovered", trainable=True)
    baked = yopo.load("llava-tiny-yopo", trainable=True)
    moved = yopo.fitted_parameters(found)
    assert moved and not all(
        torch.equal(value, moved[name]) for name, value in yopo.fitted_parameters(baked).items()
    )

    # The trained model is a checkpoint like any other: another plan can be made for it.
    second = calibrated(Path("llava-tiny-recovered"), collate, PaperRequest(**SHAPE))
    bake(second, "llava-tiny-recovered", "llava-tiny-again")
    stock = load_dense(resolve("llava-tiny-recovered"))
    with pruned(stock, second):
        expected = stock(**unseen).logits[text]
    same = yopo.load("llava-tiny-again")(**unseen).logits[text]
    torch.testing.assert_close(same, expected, atol=1e-3, rtol=1e-3)
