"""Weights in few bits: bfloat16 is served as exactly as transformers does, quantized ones never."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/test_vllm.sh does it)")

import tiny
import torch
from engines import Prompt, Reference, answers, engine, generated
from serving_models import KINDS, baked, pictures, prompt

import yopo
from yopo.support.errors import ModelError

INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = INT8 | {"type": "float"}
SCHEMES = {
    "W8A8": ("int-quantized", INT8, INT8 | {"strategy": "token", "dynamic": True}),
    "FP8": ("float-quantized", FP8, FP8 | {"strategy": "token", "dynamic": True}),
}


def prompts_of(name: str) -> list[Prompt]:
    kind = KINDS[name]
    return [
        (prompt(kind, text), [image])
        for text, image in zip(("what color is it", "is there one"), pictures(kind, 2), strict=True)
    ]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
def test_bfloat16_is_as_exact_as_in_transformers(name: str, tmp_path: Path) -> None:
    folder, prompts = baked(KINDS[name], tmp_path, (2, "refit")), prompts_of(name)
    exact = Reference.of(folder, prompts)
    dense = Reference.of(folder, prompts, dense=True)
    usual = generated(yopo.load(folder, dtype=torch.bfloat16), folder, prompts)
    tolerance = tiny.ROUNDING_FACTOR * max(
        _first_error(one, two) for one, two in zip(usual, exact.oracle, strict=True)
    )
    assert exact.distance(dense) > tolerance  # the dense model would not pass
    with engine(folder, dtype="bfloat16") as llm:
        found = answers(llm, prompts)
    for one, two in zip(found, exact.oracle, strict=True):
        assert _first_error(one, two) <= tolerance


def _first_error(one: tuple[Any, torch.Tensor], two: tuple[Any, torch.Tensor]) -> float:
    """Of the first token, whose context is the same even where rounding changes an answer."""
    return (one[1][0] - two[1][0]).abs().max().item()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights_are_refused(scheme: str, tmp_path: Path) -> None:
    form, weights, inputs = SCHEMES[scheme]
    folder = tmp_path / "quantized"
    shutil.copytree(baked(KINDS["llava"], tmp_path, (1, "refit")), folder)
    config = json.loads((folder / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be served with quantized weights"), engine(folder):
        pass
