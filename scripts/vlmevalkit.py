"""Run VLMEvalKit on a baked checkpoint, which its own classes would load as the dense model.

VLMEvalKit has no plugins: this registers a model named ``yopo`` and starts its ``run.py``, with the
arguments after the directory. From the root of a clone of VLMEvalKit:

    python .../scripts/vlmevalkit.py llava-1.5-7b-yopo --data MMBench_DEV_EN --work-dir results
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from functools import partial
from typing import Any

import torch
from PIL import Image

import yopo
from yopo.data.processing import padded, placed
from yopo.data.prompts import load_processor
from yopo.models.registry import family_of, resolve


class Answerer:
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
        images = [
            Image.open(each["value"]).convert("RGB") for each in message if each["type"] == "image"
        ]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": [_part(each) for each in message]}],
            add_generation_prompt=True,
        )
        inputs = padded(self.processor, [prompt], {"images": [images]} if images else {})
        model, length = self.model, inputs["input_ids"].shape[1]
        found = model.generate(
            **placed(inputs, model.device, model.dtype),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            suppress_tokens=list(family_of(model.config).token_ids(model.config)),
        )
        return self.processor.decode(found[0, length:], skip_special_tokens=True).strip()


def _part(part: dict[str, str]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["value"]}


def main() -> None:
    """Register the model and start VLMEvalKit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a directory that yopo apply wrote, or its hub id")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of VLMEvalKit's run.py")
    options = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel

    made = type("Yopo", (Answerer, BaseModel), {})
    supported_VLM["yopo"] = partial(made, path=options.checkpoint)
    sys.argv = ["run.py", "--model", "yopo", *options.arguments]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
