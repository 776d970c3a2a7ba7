"""``transformers serve DIRECTORY`` prunes with ``--trust-remote-code``, and is dense without."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from http_servers import message, serving
from PIL import Image
from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    pytest.skip("transformers serve needs fastapi, uvicorn and openai", allow_module_level=True)
pytest.importorskip(
    "transformers.cli.chat", reason="before transformers 5.21, its commands need requests"
)

import openai

import yopo
from yopo.calibration.measure import identify
from yopo.checkpoint.bake import bake
from yopo.models.registry import resolve
from yopo.serving.loading import load_dense

QUESTIONS = ["describe the picture", "what color is the star", "how many are there"]
TOKENS = 12
COMMAND = "import sys; from transformers.cli.transformers import main; sys.exit(main())"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baked checkpoint whose plan, drawn at random, changes what the model says."""
    source = resolve("llava-tiny")
    identity = identify(load_dense(source), "llava-tiny")
    plan = tiny.random_plan(identity, random.Random(3), compensation="mean", baked=False)
    plan = replace(plan, tensors=tiny.random_tensors(plan, 3))
    folder = tmp_path_factory.mktemp("served") / "baked"
    bake(plan, source.location, folder)
    return folder


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    data = random.Random(1).randbytes(3 * 64 * 64)
    return Image.frombytes("RGB", (64, 64), data)


def said(model: transformers.PreTrainedModel, folder: Path, picture: Image.Image) -> list[str]:
    """What a model in memory answers, greedily."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    found = []
    for question in QUESTIONS:
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        text = tokens[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(text, skip_special_tokens=True))
    return found


def served(folder: Path, picture: Image.Image, log: Path, *options: str) -> list[str]:
    """What a server answers over HTTP; every second answer is streamed."""
    command = [sys.executable, "-c", COMMAND, "serve", str(folder), "--device", "cpu", *options]
    found = []
    with serving(command, log, OMP_NUM_THREADS="1") as address:
        client = openai.OpenAI(base_url=address, api_key="none")
        for number, question in enumerate(QUESTIONS):
            answer = client.chat.completions.create(
                model=str(folder),
                messages=message(question, picture),
                temperature=0,
                max_tokens=TOKENS,
                stream=number % 2 == 1,
            )
            if number % 2:
                pieces = [part.choices[0].delta.content or "" for part in answer]
                found.append("".join(pieces))
            else:
                found.append(answer.choices[0].message.content)
    return found


def test_answers_over_http_are_pruned_with_trust_and_dense_without(
    folder: Path, picture: Image.Image, tmp_path: Path
) -> None:
    pruned = said(yopo.load(folder), folder, picture)
    dense = said(load_dense(resolve("llava-tiny")), folder, picture)
    assert all(one != two for one, two in zip(pruned, dense, strict=True))
    assert served(folder, picture, tmp_path / "log", "--trust-remote-code") == pruned
    assert served(folder, picture, tmp_path / "other log") == dense
