"""Checkpoints of published sizes with random weights, written without holding them in memory.

A model with one layer of each kind is built and saved; its layers' tensors are then written once
per layer, one layer at a time. LLaVA has a tiny vision tower and vocabulary, InternVL2-26B has its
own: InternViT-6B and 92553 words. Both take the prompts of their demo model.

    python scripts/large_checkpoint.py internvl2-26b /var/tmp/internvl2-26b
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.initialization import no_init_weights

from yopo.bench.random_model import SHAPES, random_model
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.options import RunOptions

_SCALE = 0.02


@dataclass(frozen=True)
class Made:
    """A model with few layers, and what is needed to write it with all of them.

    Attributes:
        model: With one decoder layer, and one layer of a tower that is repeated.
        processor: Makes prompts for it.
        layers: Decoder layers of the whole model.
        tower_layers: Layers of its vision tower.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    layers: int
    tower_layers: int


def llava(name: str, layers: int | None = None, side: int = 24) -> Made:
    """A LLaVA of a published decoder; its tower has a layer of 8 channels.

    Args:
        name: The published shape.
        layers: Decoder layers; None: all.
        side: Visual tokens per row and column.
    """
    shape = SHAPES[name]
    model = random_model(replace(shape, layers=1), dtype=torch.bfloat16, side=side)
    demo = ModelHandle("llava-tiny", None, RunOptions())
    fit_to_prompts(model, demo.processor, side)
    return Made(model, demo.processor, layers or shape.layers, 1)


def fit_to_prompts(model: PreTrainedModel, processor: ProcessorMixin, side: int) -> None:
    """Have a random LLaVA and the demo model's processor agree on tokens and pictures."""
    tokenizer = processor.tokenizer
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    pixels = processor.patch_size * side
    processor.image_processor.size = {"shortest_edge": pixels}
    processor.image_processor.crop_size = {"height": pixels, "width": pixels}


def internvl2_26b(layers: int | None = None) -> Made:
    """InternVL2-26B: InternLM2-20B behind InternViT-6B, one tile of 256 tokens per picture."""
    demo = ModelHandle("internvl-tiny", None, RunOptions())
    tokenizer, pictures = demo.processor.tokenizer, demo.processor.image_processor
    config = InternVLConfig(
        vision_config={
            "hidden_size": 3200,
            "intermediate_size": 12800,
            "num_hidden_layers": 1,
            "num_attention_heads": 25,
            "norm_type": "rms_norm",
            "attention_bias": False,
            "use_qk_norm": True,
            "layer_scale_init_value": 0.1,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 92553,
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 1,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_id=demo.config.image_token_id,
        image_seq_length=256,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = InternVLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.dtype = torch.bfloat16
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    pictures.size = {"height": 448, "width": 448}
    pictures.max_patches = 1
    demo.processor.image_seq_length = 256
    return Made(model, demo.processor, layers or 48, 45)


MODELS: dict[str, Callable[..., Made]] = {"internvl2-26b": internvl2_26b}


def made(name: str, layers: int | None = None, side: int = 24) -> Made:
    """A model by name (see ``llava`` and ``internvl2_26b``)."""
    return llava(name, layers, side) if name in SHAPES else MODELS[name](layers)


def write(found: Made, folder: Path) -> int:
    """Write a checkpoint, one shard per layer.

    Returns:
        Bytes of its weights.
    """
    model = found.model
    model.save_pretrained(folder, max_shard_size="1TB")
    found.processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    pattern = load_file(file)
    file.unlink()
    _set_layers(folder / "config.json", found)
    groups: dict[str, dict[str, torch.Tensor]] = {"": {}}
    for name, tensor in pattern.items():
        groups.setdefault(_stem(name), {})[name] = tensor
    index: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(_shards(groups, found)):
        shard = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, shard)
        size += sum(each.nbytes for each in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return size


def _stem(name: str) -> str:
    """``language_model.model.layers.`` of a tensor in the first such layer; empty elsewhere."""
    for part in (".layers.0.", ".layer.0."):
        if part in name:
            return name.partition(part)[0] + part.removesuffix("0.")
    return ""


def _shards(
    groups: dict[str, dict[str, torch.Tensor]], found: Made
) -> Iterator[dict[str, torch.Tensor]]:
    for stem, tensors in groups.items():
        times = found.layers if "language_model" in stem else found.tower_layers if stem else 1
        for number in range(times):
            yield {
                f"{stem}{number}.{name.removeprefix(f'{stem}0.')}" if stem else name: _filled(
                    name, each, number
                )
                for name, each in tensors.items()
            }


def _filled(name: str, tensor: torch.Tensor, number: int) -> torch.Tensor:
    """Random values, other ones in every layer; norms and scales are ones."""
    if "norm" in name or "lambda" in name:
        return torch.ones_like(tensor)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {number}".encode()))
    block = (torch.randn(1 << 20, generator=generator) * _SCALE).to(tensor.dtype)
    flat = torch.empty_like(tensor, memory_format=torch.contiguous_format).view(-1)
    for start in range(0, len(flat), len(block)):
        flat[start : start + len(block)] = block[: len(flat) - start]
    return flat.view(tensor.shape)


def _set_layers(file: Path, found: Made) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = found.layers
    config["text_config"].pop("layer_types", None)
    config["vision_config"]["num_hidden_layers"] = found.tower_layers
    file.write_text(json.dumps(config), encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted({*SHAPES, *MODELS}))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers  [default: all]")
    options = parser.parse_args(words)
    size = write(made(options.name, options.layers), options.folder)
    print(f"{options.folder}: {size / 1e9:.1f} GB of weights")


if __name__ == "__main__":
    main()
