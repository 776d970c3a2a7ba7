"""Run VLMEvalKit on a baked checkpoint, which its own classes would load as the dense model.

VLMEvalKit has no plugins: this registers a model named ``yopo`` and starts its ``run.py``, with the
arguments after the directory. From the root of a clone of VLMEvalKit:

    python .../scripts/vlmevalkit.py llava-1.5-7b-yopo --data MMBench_DEV_EN --work-dir results
"""

from __future__ import annotations

import os
import runpy
import sys
from functools import partial
from typing import Any

import torch
from PIL import Image

import yopo
from yopo.data.prompts import load_processor, processed
from yopo.models.registry import family_of, resolve

sys.path.insert(0, os.getcwd())

from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel


class Yopo(BaseModel):
    """A pruned model: images and text in the order in which a benchmark gives them."""

    INTERLEAVE = True

    def __init__(self, path: str, max_new_tokens: int = 512):
        super().__init__()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = yopo.load(path, device_map=device)
        self.processor = load_processor(resolve(path).location)
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Answer a message greedily."""
        parts = [{"type": "image"} if each["type"] == "image" else _text(each) for each in message]
        images = [
            Image.open(each["value"]).convert("RGB") for each in message if each["type"] == "image"
        ]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        inputs = processed(self.processor, [prompt], [images] if images else None)
        model, length = self.model, inputs["input_ids"].shape[1]
        placed = {
            name: each.to(model.device, model.dtype if each.is_floating_point() else None)
            for name, each in inputs.items()
        }
        found = model.generate(
            **placed,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            suppress_tokens=list(family_of(model.config).token_ids(model.config)),
        )
        return self.processor.decode(found[0, length:], skip_special_tokens=True).strip()


def _text(part: dict[str, str]) -> dict[str, Any]:
    return {"type": "text", "text": part["value"]}


if __name__ == "__main__":
    supported_VLM["yopo"] = partial(Yopo, path=sys.argv[1])
    sys.argv = ["run.py", "--model", "yopo", *sys.argv[2:]]
    runpy.run_path("run.py", run_name="__main__")
