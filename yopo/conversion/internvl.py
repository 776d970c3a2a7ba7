"""``yopo convert``: converts an original InternVL checkpoint, without loading the model.

The code that comes with OpenGVLab/InternVL2-* does not run on transformers 5, but the models
consist of parts that transformers has. Only names, the place of some rows and the configuration
change. The result is checked against the tensors that transformers' own class expects, by name and
shape, before anything is written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yopo.checkpoint.headers import Shard
from yopo.checkpoint.reader import INDEX_FILE, read_config, read_shards
from yopo.checkpoint.writer import OutputDirectory
from yopo.conversion.config_json import translate
from yopo.conversion.sidecar_files import IMAGE_TOKEN, documents, files_to_copy, token_id
from yopo.conversion.tensors import NewTensor, index_json, new_tensors, rules_of, write_shard
from yopo.support import console
from yopo.support.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import InternVLConfig

ORIGINAL = "internvl_chat"
"""``model_type`` of original checkpoints."""

_ROOM = 2**20
"""Bytes reserved for generated files."""

_HUB_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""Module name -> name in a checkpoint, prefix by prefix."""


@dataclass(frozen=True)
class Conversion:
    """The result of ``convert``.

    Attributes:
        output: The checkpoint directory.
        num_tensors: Tensors in it.
        num_bytes: Size of its shards' data.
        seconds: Wall time.
        notes: Sentences about what the user should know or add.
    """

    output: Path
    num_tensors: int
    num_bytes: int
    seconds: float
    notes: tuple[str, ...]


def convert(source: str | Path, output: str | Path, *, force: bool = False) -> Conversion:
    """Write the native form of an original InternVL checkpoint.

    Args:
        source: Its directory; only read.
        output: The directory to create.
        force: Whether a checkpoint in ``output`` may be replaced.

    Raises:
        CheckpointError: The source is not one, is incomplete, or has something unknown in it.
        OutputError: The output exists, overlaps with the source or cannot be written.
    """
    started = time.perf_counter()
    source = Path(source)
    raw = read_config(source)
    if raw.get("model_type") != ORIGINAL:
        raise CheckpointError(
            f"{source}: has type '{raw.get('model_type')}', not an original InternVL checkpoint "
            f"({ORIGINAL}).",
            remedy="Checkpoints that transformers loads need no conversion.",
        )
    image_token_id = token_id(source, IMAGE_TOKEN)
    keywords = translate(raw, image_token_id)
    config = _native_config(source, keywords)
    texts = documents(source, raw, keywords) | {"config.json": config.to_json_string()}
    shards, is_indexed = read_shards(source)
    plan = _plan(source, shards, raw, config)
    num_bytes = sum(tensor.num_bytes for tensors in plan.values() for tensor in tensors)
    target = OutputDirectory(output, source=source, num_bytes=num_bytes + _ROOM, force=force)
    with target as folder:
        total = sum(map(len, plan.values()))
        for _ in console.track(
            _write(source, folder, plan), label="converting", total=total, unit="tensors"
        ):
            pass
        if is_indexed:
            (folder / INDEX_FILE).write_text(index_json(plan), encoding="utf-8")
        for path in files_to_copy(source):
            shutil.copyfile(path, folder / path.name)
        for name, text in texts.items():  # config.json last: it makes the folder a checkpoint
            (folder / name).write_text(text, encoding="utf-8")
    seconds = time.perf_counter() - started
    return Conversion(Path(output), total, num_bytes, seconds, _notes(source, raw, image_token_id))


def _native_config(source: Path, keywords: Mapping[str, Any]) -> InternVLConfig:
    from transformers import InternVLConfig

    try:
        return InternVLConfig(**keywords)
    except Exception as error:  # its validation raises many kinds
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{source}: transformers rejects the translated configuration: {reason}"
        ) from error


def _plan(
    source: Path, shards: tuple[Shard, ...], raw: Mapping[str, Any], config: InternVLConfig
) -> dict[str, list[NewTensor]]:
    """The tensors of every shard of the result, checked against what transformers expects."""
    tied = frozenset({"language_model.lm_head.weight"} if config.tie_word_embeddings else ())
    text = config.get_text_config().to_dict()
    rules = rules_of(raw["llm_config"]["architectures"][0], text)
    plan = {shard.file: new_tensors(shard, rules, skipped=tied) for shard in shards}
    found = {tensor.name: tensor.shape for tensors in plan.values() for tensor in tensors}
    expected = {name: shape for name, shape in expected_tensors(config).items() if name not in tied}
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{source}: has no tensor for '{name}', which the model needs.")
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{source}: has '{name}', which the native model does not have.")
    for name, shape in found.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"{source}: '{name}' would have shape {shape}, expected {expected[name]} from "
                "config.json."
            )
    return plan


def expected_tensors(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    """Name in a checkpoint -> shape, for every tensor that transformers' class loads."""
    import torch
    from transformers import InternVLForConditionalGeneration

    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    expected = {}
    for name, tensor in model.state_dict().items():
        prefix = next(prefix for prefix in _HUB_NAMES if name.startswith(prefix))
        expected[_HUB_NAMES[prefix] + name.removeprefix(prefix)] = tuple(tensor.shape)
    return expected


def _write(source: Path, folder: Path, plan: Mapping[str, list[NewTensor]]) -> Iterator[NewTensor]:
    for file, tensors in plan.items():
        yield from write_shard(source / file, folder / file, tensors)


def _notes(source: Path, raw: Mapping[str, Any], image_token_id: int) -> tuple[str, ...]:
    notes = [
        f"{IMAGE_TOKEN} has id {image_token_id}, according to the tokenizer files.",
        "The original adds a system message before every conversation; the chat template does "
        "not, so pass one if you want it.",
    ]
    scaling = raw["llm_config"].get("rope_scaling")
    if scaling:
        kind = scaling.get("type") or scaling.get("rope_type")
        notes.append(
            f"Rope scaling '{kind}' uses transformers' implementation, which was not compared with "
            "the original code on real weights."
        )
    if raw["vision_config"].get("qk_normalization"):
        notes.append("The tower norms its queries and keys (InternViT-6B): not verified.")
    if not (source / "tokenizer.json").is_file():
        notes.append(
            "There is no tokenizer.json: if transformers cannot make one from tokenizer.model "
            "(InternLM2's tokenizer is custom code), take the tokenizer files of an -hf repository "
            f"with the same vocabulary, in which {IMAGE_TOKEN} must have the same id."
        )
    return tuple(notes)
