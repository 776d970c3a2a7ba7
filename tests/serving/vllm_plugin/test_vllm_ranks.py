"""Two ranks answer as one does, and so does an engine that may compile and use graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/test_vllm.sh does it)")

from engines import Prompt, Reference, answers, engine
from serving_models import KINDS, Kind, baked, pictures, prompt


def prompts_for(kind: Kind) -> list[Prompt]:
    """A prompt with an image, one with two, one without."""
    one, two = pictures(kind, 2)
    return [
        (prompt(kind, "what color is the red one"), [one]),
        (prompt(kind, "is there one", 2), [one, two]),
        ("what is there", []),
    ]


def check(name: str, compensation: str, folder: Path, **options: Any) -> None:
    """Compare an engine's answers with the oracle's."""
    kind = KINDS[name]
    checkpoint = baked(kind, folder, (len(compensation), compensation))
    prompts = prompts_for(kind)
    reference = Reference.of(checkpoint, prompts)
    with engine(checkpoint, **options) as llm:
        ranks = llm.llm_engine.vllm_config.parallel_config.world_size
        assert ranks == options.get("tensor_parallel_size", 1)
        reference.check(answers(llm, prompts))


@pytest.mark.parametrize(
    ("name", "compensation"),
    [("llava", "refit"), ("llava", "mean"), ("qwen2_vl", "refit"), ("qwen3_vl", "refit")],
)
def test_two_ranks(name: str, compensation: str, tmp_path: Path) -> None:
    """Heads are split, GQA's KV heads one each, neurons and maps dealt out in turn."""
    check(name, compensation, tmp_path, tensor_parallel_size=2)


def test_an_engine_with_its_usual_compilation(tmp_path: Path) -> None:
    check("llava", "refit", tmp_path, enforce_eager=False)
