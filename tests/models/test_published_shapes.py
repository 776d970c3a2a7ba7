"""FLOPs of the full-size models, from the configurations that their authors published.

The numbers below are those of the ``config.json`` on the hub, written down here because tests have
no network. Models are built on the meta device: shapes without weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import statistics_maker
import torch
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from yopo.cli.calibrate import command
from yopo.cli.config import load_config
from yopo.cli.options import plan_request
from yopo.models.family import shape_of
from yopo.models.registry import ALIASES, family_of
from yopo.planning.planner import make_plan
from yopo.plans.flops import dense_visual_flops, dense_visual_kv_bytes, visual_budget
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, Workload

CONFIGS = Path(__file__).parents[2] / "configs"

KEYS = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn")
SHAPES = {
    "qwen2-vl-2b": (28, 1536, 12, 2, 128, 8960),
    "qwen2-vl-7b": (28, 3584, 28, 4, 128, 18944),
    "qwen2.5-vl-3b": (36, 2048, 16, 2, 128, 11008),
    "qwen2.5-vl-7b": (28, 3584, 28, 4, 128, 18944),
    "qwen3-vl-4b": (36, 2560, 32, 8, 128, 9728),
    "qwen3-vl-8b": (36, 4096, 32, 8, 128, 12288),
}
NON_EMBEDDING = {
    "qwen2-vl-2b": 1.31,
    "qwen2-vl-7b": 6.53,
    "qwen2.5-vl-3b": 2.77,
    "qwen2.5-vl-7b": 6.53,
    "qwen3-vl-4b": 3.6,
    "qwen3-vl-8b": 6.95,
}
"""Billions of parameters, by the cards of the language models that they are made of."""

IMAGE = Workload((Grid(32, 32),), 64, 15)


def published(name: str) -> PreTrainedConfig:
    """Return the configuration as on the hub: flat for Qwen2(.5)-VL, nested for Qwen3-VL."""
    numbers = dict(zip(KEYS, SHAPES[name], strict=True))
    text: dict[str, Any] = {
        "num_hidden_layers": numbers["layers"],
        "hidden_size": numbers["hidden"],
        "num_attention_heads": numbers["heads"],
        "num_key_value_heads": numbers["kv_heads"],
        "intermediate_size": numbers["ffn"],
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": numbers["layers"],
    }
    if name.startswith("qwen3"):
        text |= {"head_dim": numbers["head_dim"]}
        text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}}
        vision = {"out_hidden_size": numbers["hidden"]}
        return Qwen3VLConfig(text_config=text, vision_config=vision)
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6}
    if name.startswith("qwen2.5"):
        return Qwen2_5_VLConfig(**text, vision_config={"out_hidden_size": numbers["hidden"]})
    return Qwen2VLConfig(**text, vision_config={"hidden_size": numbers["hidden"]})


@pytest.mark.parametrize("name", SHAPES)
def test_shape_and_family_are_read_from_the_published_configuration(name: str) -> None:
    config = published(name)
    assert shape_of(config) == ModelShape(*SHAPES[name])
    family = family_of(config)
    assert name in family.aliases and ALIASES[name].startswith("Qwen/Qwen")
    assert family.backbone(config).position_axes == 3


@pytest.mark.parametrize("name", SHAPES)
def test_dense_flops_are_two_per_weight_and_token(name: str) -> None:
    """Compared with the weights of the real architecture, and their number on the model cards."""
    config = published(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shape, tokens = shape_of(config), IMAGE.visual
    weights = sum(
        each.numel() for each in model.get_decoder().layers.parameters() if each.dim() == 2
    )
    attention = 4 * tokens**2 * shape.heads * shape.head_dim * shape.layers
    found = dense_visual_flops(shape, IMAGE)
    assert found == 2 * weights * tokens + attention
    assert weights / 1e9 == pytest.approx(NON_EMBEDDING[name], rel=0.01)
    assert type(model).__name__ == family_of(config).architecture


def test_the_visual_cache_of_qwen2_vl_7b_has_the_published_size() -> None:
    """Four KV heads of 128 in 28 layers: 57 344 bytes per visual token in 16 bit."""
    assert dense_visual_kv_bytes(ModelShape(*SHAPES["qwen2-vl-7b"]), IMAGE) == 57344 * 1024


@pytest.mark.parametrize("grid", [Grid(32, 32), Grid(17, 60)])
@pytest.mark.parametrize("kv_groups", [False, True], ids=["single heads", "groups"])
def test_the_papers_share_of_qwen2_vl_7b_is_reached(kv_groups: bool, grid: Grid) -> None:
    """30.51 of 44.25 TFLOPs, by the configuration that comes with yopo."""
    path = CONFIGS / "qwen2-vl-7b.yaml"
    arguments = ["--config", str(path), *(["--kv-groups"] if kv_groups else [])]
    with command.make_context("calibrate", arguments) as context:
        request = plan_request(context)
    assert (request.budget, request.template) == (0.69, "paper")
    assert load_config(path, command)["budget"] == pytest.approx(30.51 / 44.25, abs=0.001)
    statistics = statistics_maker.make(
        shape=ModelShape(*SHAPES["qwen2-vl-7b"]),
        family="qwen2_vl",
        workload=Workload((grid,), 64, 15),
    )
    plan, _ = make_plan(statistics, request)
    assert visual_budget(plan) == pytest.approx(0.69, rel=0.01) and visual_budget(plan) <= 0.69
