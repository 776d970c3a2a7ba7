"""Tiny real LLaVA models on three decoders, saved in every layout that a hub checkpoint has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from yopo.models.family import shape_of
from yopo.models.fingerprint import fingerprint_of_decoder
from yopo.plans.grid import Grid
from yopo.plans.schema import (
    Budget,
    LayerPlan,
    Measured,
    ModelIdentity,
    ModelShape,
    PruningPlan,
    Workload,
)
from yopo.plans.tensors import PlanTensors, refit_sizes
from yopo.support import console

IMAGE_TOKEN = 63
LAYERS = 3
HEADS = 4
HEAD_DIM = 8
FFN = 44

TEXT_CONFIGS = {
    "mha": (LlamaConfig, HEADS),
    "gqa": (LlamaConfig, 2),
    "qwen2": (Qwen2Config, 2),  # with q, k and v biases
}


@dataclass(frozen=True)
class Saved:
    """A model and the directory that it was saved to."""

    model: LlavaForConditionalGeneration
    path: Path


def build_model(kind: str) -> LlavaForConditionalGeneration:
    text_class, kv_heads = TEXT_CONFIGS[kind]
    text = text_class(
        vocab_size=64,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
    )
    vision = CLIPVisionConfig(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # far from zero, so that a wrong order cannot hide in rounding
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return model


def random_refit(
    layers: tuple[LayerPlan, ...], shape: ModelShape, generator: torch.Generator
) -> dict[int, dict[str, torch.Tensor]]:
    """Fitted weights of the right sizes, any two rows and columns of which differ."""
    return {
        index: {
            name: torch.randn(size, generator=generator)
            for name, size in refit_sizes(layer, shape).items()
        }
        for index, layer in enumerate(layers)
    }


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    console.set_quiet(True)
    yield
    console.set_quiet(False)


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[..., Saved]:
    """Factory: (kind, hub layout?, sharded?, dtype) -> model and directory, each made once."""
    made: dict[tuple, Saved] = {}

    def get(
        kind: str = "mha",
        *,
        hub_layout: bool = True,
        sharded: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Saved:
        key = (kind, hub_layout, sharded, dtype)
        if key not in made:
            model = build_model(kind).to(dtype)
            path = tmp_path_factory.mktemp("checkpoints") / f"{kind}-model"
            model.save_pretrained(
                path,
                save_original_format=hub_layout,
                max_shard_size="40KB" if sharded else "1GB",
            )
            (path / "README.md").write_text("---\nlicense: llama2\n---\n# Original\n")
            (path / "chat_template.jinja").write_text("{{ messages }}")
            (path / "pytorch_model.bin").write_bytes(b"pickle")
            (path / ".git").mkdir()
            made[key] = Saved(model, path)
        return made[key]

    return get


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., PruningPlan]:
    """Factory: model -> a plan that needs a non-trivial order in every layer."""

    def make(model: LlavaForConditionalGeneration, *, compensation: str = "none") -> PruningPlan:
        shape = shape_of(model.config)
        generator = torch.Generator().manual_seed(3)
        rho = torch.rand(shape.layers, shape.heads, generator=generator)
        rho[0] = torch.arange(shape.heads) / shape.heads  # most active last: never the identity
        layers = (
            LayerPlan(
                tuple(range(shape.heads)),
                attend_heads=tuple(range(shape.heads)),
                radius=None,
                neurons=shape.ffn,
            ),
            LayerPlan((1, 3), attend_heads=(1, 3), radius=1, neurons=20),
            LayerPlan((2,), attend_heads=(), radius=None, neurons=7),
        )
        if compensation == "refit":  # heads that read but do not attend are among the others
            layers = (
                LayerPlan((0, 1, 2, 3), (1, 2), None, shape.ffn, qkv_rank=9),
                LayerPlan((0, 1, 3), (0, 3), 1, 20, qkv_rank=5, map_rank=3),
                LayerPlan((2,), (2,), None, 0, map_rank=4),
            )
        order = torch.stack(
            [torch.randperm(shape.ffn, generator=generator) for _ in range(shape.layers)]
        )
        tensors = PlanTensors(neuron_order=order)
        if compensation == "mean":
            tensors = PlanTensors(
                neuron_order=order,
                neuron_mean=torch.rand(shape.layers, shape.ffn, generator=generator),
                head_mean=torch.rand(
                    shape.layers, shape.heads, shape.head_dim, generator=generator
                ),
            )
        if compensation == "refit":
            tensors = PlanTensors(neuron_order=order, refit=random_refit(layers, shape, generator))
        fingerprint = fingerprint_of_decoder(model.get_decoder())
        plan = PruningPlan(
            model=ModelIdentity("llava-1.5-7b", "llava", shape, fingerprint),
            workload=Workload((Grid(2, 2),), text=5, text_before=1),
            layers=layers,
            budget=Budget(None, 0.5),
            compensation=compensation,
            tensors=tensors,
            measured=Measured(
                rho=tuple(tuple(row) for row in rho.tolist()),
                cross_modal=(0.1,) * shape.layers,
                concentration=(0.5,) * shape.layers,
                locality=(1,) * shape.layers,
            ),
            provenance={"pairs": "synthetic", "samples": 2},
        )
        return plan

    return make


@pytest.fixture(scope="session")
def inputs() -> dict[str, torch.Tensor]:
    """One image of 2 x 2 visual tokens between text tokens."""
    torch.manual_seed(1)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 4, 9, 11, 3, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 28, 28),
    }
