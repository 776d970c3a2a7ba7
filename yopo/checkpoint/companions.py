"""What stands beside the weights of a baked checkpoint: config.json, loader code, copied files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yopo
from yopo.checkpoint.reader import INDEX_FILE, Checkpoint

PLAN_FILE = "yopo_plan.yaml"
TENSORS_FILE = "yopo.safetensors"
PLAN_FILES = "yopo_plan*.yaml"
"""Every plan of a checkpoint: the first one and those that were baked with it."""
CODE_FILE = "modeling_yopo.py"
CARD_FILE = "README.md"
ORIGINAL_CARD_FILE = "README.original.md"
CLASS_NAME = "YopoForConditionalGeneration"

_OURS = frozenset({"config.json", PLAN_FILE, TENSORS_FILE, CODE_FILE, CARD_FILE})

_WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .gguf .ckpt .h5 .msgpack .onnx .onnx_data .ot .tflite".split()
)

MODELING_CODE = f'''\
"""Loads this checkpoint pruned: AutoModelForImageTextToText with trust_remote_code=True."""

try:
    from yopo.serving import PrunedForConditionalGeneration
except ImportError as error:
    raise ImportError(
        "Loading this checkpoint pruned needs the Python package yopo: install it, or load the "
        "dense model with trust_remote_code=False."
    ) from error


class {CLASS_NAME}(PrunedForConditionalGeneration):
    """The stock model, with the visual computation that {PLAN_FILE} prunes left out."""
'''


def numbered(name: str, number: int) -> str:
    """Name of a checkpoint's plan or tensors file: as it is for the first, numbered behind."""
    stem, dot, suffix = name.partition(".")
    return name if number == 0 else f"{stem}-{number}{dot}{suffix}"


def is_baked(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint came out of ``bake``."""
    return "yopo" in checkpoint.raw_config


def config_json(checkpoint: Checkpoint) -> str:
    """The source's config.json with the keys added that find the plan and the loader code."""
    config: dict[str, Any] = dict(checkpoint.raw_config)
    config["yopo"] = {"version": yopo.__version__, "plan": PLAN_FILE}
    code = {"AutoModelForImageTextToText": f"{Path(CODE_FILE).stem}.{CLASS_NAME}"}
    config["auto_map"] = {**(config.get("auto_map") or {}), **code}
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def files_to_copy(checkpoint: Checkpoint) -> dict[str, Path]:
    """The source's small files: tokenizer, processor, generation config, templates, license.

    Weights in any format stay behind: their heads and neurons stand in the old order.

    Returns:
        Path inside the output -> file of the source.
    """
    folder = checkpoint.path
    found = [path for path in sorted(folder.iterdir()) if _is_companion(path, checkpoint)]
    copies = {path.name: path for path in found}
    for template in sorted(folder.glob("additional_chat_templates/*.jinja")):
        copies[str(template.relative_to(folder))] = template
    card = folder / CARD_FILE
    if card.is_file() and not is_baked(checkpoint):
        copies[ORIGINAL_CARD_FILE] = card
    return copies


def _is_companion(path: Path, checkpoint: Checkpoint) -> bool:
    if not path.is_file() or path.name.startswith(".") or path.name in _OURS:
        return False
    if path.match(PLAN_FILES):
        return False
    if path.suffix in _WEIGHT_SUFFIXES:
        return False
    if path.name.endswith(".index.json"):  # of weights that stay behind, unless it is ours
        return checkpoint.is_indexed and path.name == INDEX_FILE
    return True
