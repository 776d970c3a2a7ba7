"""Small models of four families for vLLM, whose CPU kernels want heads of 32 numbers or more.

Weights are random; tokenizers and processors are the demo models'.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from yopo.calibration.measure import identify
from yopo.checkpoint.bake import bake
from yopo.demo import INTERNVL_TINY, LLAVA_TINY, QWEN2_VL_TINY
from yopo.plans.flops import visual_budget
from yopo.plans.grid import Grid
from yopo.plans.layer_plan import LayerPlan, ModelShape
from yopo.plans.schema import Budget, PruningPlan, Workload

LAYERS = 4


@dataclass(frozen=True)
class Kind:
    """A family as it is tested.

    Attributes:
        name: In test ids.
        source: The demo model with its tokenizer and processor.
        text: Changes of its text configuration.
        image: What one image is in a prompt.
        sizes: Width and height of two different images.
        other: Changes of the rest of its configuration.
        renamed: Names that its processor files have instead.
    """

    name: str
    source: Path
    text: dict[str, Any]
    image: str
    sizes: tuple[tuple[int, int], tuple[int, int]]
    other: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


HEADS = {"num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": LAYERS}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
GQA = HEADS | {"num_key_value_heads": 2}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
DEEPSTACK = {
    "depth": 3,
    "hidden_size": 96,
    "out_hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
    "patch_size": 6,
    "spatial_merge_size": 2,
}
KINDS = {
    kind.name: kind
    for kind in (
        Kind("llava", LLAVA_TINY, HEADS | {"num_key_value_heads": 4}, "<image>", ((64, 64),) * 2),
        Kind(
            "qwen2_vl",
            QWEN2_VL_TINY,
            GQA | {"rope_parameters": MROPE},
            QWEN_IMAGE,
            ((72, 60), (48, 96)),
        ),
        Kind(
            "qwen3_vl",
            QWEN2_VL_TINY,
            GQA
            | {
                "rope_parameters": MROPE | {"mrope_interleaved": True},
                "model_type": "qwen3_vl_text",
            },
            QWEN_IMAGE,
            ((72, 60), (48, 96)),
            {
                "architectures": ["Qwen3VLForConditionalGeneration"],
                "model_type": "qwen3_vl",
                "vision_config": DEEPSTACK,
            },
            {"Qwen2VLProcessor": "Qwen3VLProcessor", "Qwen2VLVideo": "Qwen3VLVideo"},
        ),
        Kind("internvl", INTERNVL_TINY, GQA, "<IMG_CONTEXT>", ((48, 48), (96, 48))),
    )
}


def build(kind: Kind, folder: Path) -> transformers.PreTrainedModel:
    """Write a model with random weights and everything that an engine needs beside it."""
    raw = json.loads((kind.source / "config.json").read_text())
    text = raw["text_config"] | kind.text
    text.pop("layer_types", None)
    raw |= {"text_config": text, "dtype": "float32"} | kind.other
    folder.mkdir(parents=True)
    for path in kind.source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            content = path.read_text()
            for name, other in kind.renamed.items():
                content = content.replace(name, other)
            (folder / path.name).write_text(content)
    (folder / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, raw["architectures"][0])(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name and weight.ndim == 1:
                    weight.add_(0.2 * torch.randn_like(weight))
                elif name.endswith("bias"):
                    weight.normal_(std=0.1)
                elif "layers" in name or "lm_head" in name:
                    weight.normal_(std=weight.shape[-1] ** -0.5)
    model.save_pretrained(folder, save_original_format=True)
    if config.vision_config.model_type == "clip_vision_model":
        _name_as_published(folder / "model.safetensors")
    return model


def _name_as_published(file: Path) -> None:
    """Name CLIP's tensors as the published LLaVA checkpoints do; transformers leaves a part out."""
    weights = load_file(file)
    for name in list(weights):
        tower, dot, rest = name.partition(".")
        if tower == "vision_tower" and rest.startswith(("embeddings", "encoder", "p")):
            weights[f"vision_tower.vision_model.{rest}"] = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})


def servable_layer(shape: ModelShape, rng: random.Random, *, fitted: bool) -> LayerPlan:
    """Draw a layer in which every head reads; anything else is left to chance."""
    heads = tuple(range(shape.heads))
    some = tuple(sorted(rng.sample(heads, rng.randint(1, shape.heads - 1))))
    neurons = rng.choice([0, 1, shape.ffn // 5, shape.ffn // 2, shape.ffn])
    has_map = fitted and neurons < shape.ffn and rng.random() < 0.7
    return LayerPlan(
        read_heads=heads,
        attend_heads=rng.choice([(), heads, some, some]),
        radius=None,
        neurons=neurons,
        qkv_rank=rng.randint(8, shape.hidden // 2) if fitted and rng.random() < 0.7 else None,
        map_rank=rng.randint(1, 12) if has_map else 0,
    )


def servable_plan(model: transformers.PreTrainedModel, seed: int, compensation: str) -> PruningPlan:
    """Draw a plan that an engine can run, with its tensors."""
    identity, rng = identify(model, "tiny"), random.Random(seed)
    layers = tuple(
        servable_layer(identity.shape, rng, fitted=compensation == "refit")
        for _ in range(identity.shape.layers)
    )
    workload = Workload((Grid(8, 8),), 12, 4)
    plan = PruningPlan(
        identity, workload, layers, Budget(None, 0.5), compensation=compensation, baked=False
    )
    plan = replace(plan, budget=Budget(None, round(visual_budget(plan), 6)))
    return replace(plan, tensors=tiny.random_tensors(plan, seed))


def baked(kind: Kind, folder: Path, *seeds: tuple[int, str]) -> Path:
    """Write a checkpoint with a baked random plan (or several)."""
    model = build(kind, folder / "dense")
    plans = [servable_plan(model, seed, compensation) for seed, compensation in seeds]
    order = plans[0].tensors.neuron_order  # all in one checkpoint have the same
    plans = [replace(plan, tensors=replace(plan.tensors, neuron_order=order)) for plan in plans]
    bake(plans[0], folder / "dense", folder / "baked", also=plans[1:])
    return folder / "baked"


def pictures(kind: Kind, count: int) -> list[Image.Image]:
    """Different images, of different sizes where the family allows them."""
    rng = random.Random(5)
    made = []
    for number in range(count):
        size = kind.sizes[number % 2]
        image = Image.new("RGB", size)
        image.putdata(
            [tuple(rng.randrange(256) for _ in range(3)) for _ in range(size[0] * size[1])]
        )
        made.append(image)
    return made


def prompt(kind: Kind, text: str, images: int = 1) -> str:
    """A prompt with images before a text."""
    return kind.image * images + "\n" + text
