"""The files next to a baked checkpoint's weights: config.json, loader code, copied files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yopo.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from yopo.models.registry import family_of
from yopo.plans.places import PLAN_FILE, PLAN_FILES
from yopo.support.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TENSORS_FILE = "yopo.safetensors"
TENSORS_FILES = "yopo*.safetensors"
CODE_FILE = "modeling_yopo.py"
CARD_FILE = "README.md"
ORIGINAL_CARD_FILE = "README.original.md"
CLASS_NAME = "YopoForConditionalGeneration"
BASE_CLASS_NAME = "YopoModel"

_OURS = frozenset({"config.json", PLAN_FILE, TENSORS_FILE, CODE_FILE, CARD_FILE})

_WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .gguf .ckpt .h5 .msgpack .onnx .onnx_data .ot .tflite".split()
)

_CODE_SUFFIX = ".py"

_MAX_CONFIG = 2**27
"""Maximum bytes of a JSON file that is searched for code; no configuration is that long."""

MODELING_CODE = f'''\
"""Loads this checkpoint pruned: AutoModelForImageTextToText with trust_remote_code=True."""

try:
    from yopo.serving import PrunedForConditionalGeneration, PrunedModel
except ImportError as error:
    raise ImportError(
        "Loading this checkpoint pruned needs the Python package yopo: install it, or load the "
        "dense model with trust_remote_code=False."
    ) from error


class {CLASS_NAME}(PrunedForConditionalGeneration):
    """The stock model, with the visual computation that {PLAN_FILE} prunes left out."""


class {BASE_CLASS_NAME}(PrunedModel):
    """The same model without its language modeling head."""
'''


def numbered(name: str, number: int) -> str:
    """Name of a checkpoint's plan or tensors file: unchanged for the first, then numbered."""
    stem, dot, suffix = name.partition(".")
    return name if number == 0 else f"{stem}-{number}{dot}{suffix}"


def is_baked(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint came out of ``bake``."""
    return "yopo" in checkpoint.raw_config


def config_json(checkpoint: Checkpoint) -> str:
    """The source's config.json with the keys that locate the plan and the loader code.

    No other keys name code: the code in the source's own ``auto_map`` is not copied.
    """
    config: dict[str, Any] = without_code(checkpoint.raw_config)
    config["yopo"] = {"version": __version__, "plan": PLAN_FILE}
    config["auto_map"] = auto_map(checkpoint.config)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """Our loader code for every Auto class that stock transformers has for a model.

    An omitted Auto class would silently load the dense model.
    """
    from transformers.models.auto import modeling_auto

    module, architecture = Path(CODE_FILE).stem, family_of(config).architecture
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or type(config) not in mapping:
            continue
        stock = mapping[type(config)]
        if stock.__name__ == architecture:
            found[name] = f"{module}.{CLASS_NAME}"
        elif name == "AutoModel":
            found[name] = f"{module}.{BASE_CLASS_NAME}"
    return found


def without_code(config: Any) -> Any:
    """A configuration without keys, at any depth, that make transformers run custom code."""
    if isinstance(config, dict):
        return {key: without_code(value) for key, value in config.items() if key != "auto_map"}
    return [without_code(value) for value in config] if isinstance(config, list) else config


def copy_companion(source: Path, target: Path) -> None:
    """Copy one of ``files_to_copy``; a JSON file that names code loses those keys."""
    if source.suffix == ".json" and source.stat().st_size < _MAX_CONFIG:
        text = source.read_bytes()
        if b'"auto_map"' in text:
            text = json.dumps(without_code(json.loads(text)), indent=2, ensure_ascii=False).encode()
        target.write_bytes(text)
    else:
        shutil.copyfile(source, target)


def index_json(checkpoint: Checkpoint) -> str | None:
    """An index for a checkpoint of one file; None if it already has one.

    Without it, engines that load every safetensors file as weights would read ours as well.
    """
    if checkpoint.is_indexed:
        return None
    total = sum(entry.num_bytes for entry in checkpoint.tensors.values())
    names = dict.fromkeys(sorted(checkpoint.tensors), SINGLE_FILE)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    return json.dumps(index, indent=2) + "\n"


def files_left_out(checkpoint: Checkpoint) -> list[str]:
    """Names of the source's code files, which ``files_to_copy`` omits."""
    files = sorted(checkpoint.path.glob(f"*{_CODE_SUFFIX}"))
    return [path.name for path in files if path.name != CODE_FILE]


def files_to_copy(checkpoint: Checkpoint) -> dict[str, Path]:
    """The source's small files: tokenizer, processor, generation config, templates, license.

    Weights in any format are not copied: their heads and neurons are in the old order. Neither is
    code: ``trust_remote_code=True``, set to load the pruned model, is trust only in ours.

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
    if path.suffix in _WEIGHT_SUFFIXES or path.suffix == _CODE_SUFFIX:
        return False
    if path.name.endswith(".index.json"):  # of weights that are not copied, unless it is ours
        return checkpoint.is_indexed and path.name == INDEX_FILE
    return True
