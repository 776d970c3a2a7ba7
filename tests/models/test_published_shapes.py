"""FLOPs of the full-size models, from the configurations that their authors published.

The numbers below are those of the ``config.json`` on the hub, written down here because tests have
no network. Models are built on the meta device: shapes without weights. They were read where
public repositories quote those files:

* Qwen2-VL and Qwen2.5-VL: the printed modules in acproject/duorou (docs/qwen2.5vl_graph.md,
  docs/new_feat.md: ``Embedding(152064, 3584)``), and quoted configurations of Qwen2.5-32B and -72B;
* Qwen3-VL 2B and 8B (sizes, tied weights, rope): pytorch/torchtitan
  (torchtitan/experiments/qwen3_vl/__init__.py); 32B and InternVL3.5: quoted configurations of
  Qwen3, on which they are built.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import statistics_maker
import torch
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    PreTrainedConfig,
    PreTrainedModel,
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
    "qwen2-vl-72b": (80, 8192, 64, 8, 128, 29568),
    "qwen2.5-vl-3b": (36, 2048, 16, 2, 128, 11008),
    "qwen2.5-vl-7b": (28, 3584, 28, 4, 128, 18944),
    "qwen2.5-vl-32b": (64, 5120, 40, 8, 128, 27648),
    "qwen2.5-vl-72b": (80, 8192, 64, 8, 128, 29568),
    "qwen3-vl-2b": (28, 2048, 16, 8, 128, 6144),
    "qwen3-vl-4b": (36, 2560, 32, 8, 128, 9728),
    "qwen3-vl-8b": (36, 4096, 32, 8, 128, 12288),
    "qwen3-vl-32b": (64, 5120, 64, 8, 128, 25600),
    "internvl3.5-1b": (28, 1024, 16, 8, 128, 3072),
    "internvl3.5-2b": (28, 2048, 16, 8, 128, 6144),
    "internvl3.5-4b": (36, 2560, 32, 8, 128, 9728),
    "internvl3.5-8b": (36, 4096, 32, 8, 128, 12288),
    "internvl3.5-14b": (40, 5120, 40, 8, 128, 17408),
    "internvl3.5-38b": (64, 5120, 64, 8, 128, 25600),
}
NON_EMBEDDING = {
    "qwen2-vl-2b": 1.31,
    "qwen2-vl-7b": 6.53,
    "qwen2-vl-72b": 70.2,
    "qwen2.5-vl-3b": 2.77,
    "qwen2.5-vl-7b": 6.53,
    "qwen2.5-vl-32b": 31.0,
    "qwen2.5-vl-72b": 70.0,
    "qwen3-vl-2b": 1.4,
    "qwen3-vl-4b": 3.6,
    "qwen3-vl-8b": 6.95,
    "qwen3-vl-32b": 31.2,
    "internvl3.5-1b": 0.44,
    "internvl3.5-2b": 1.4,
    "internvl3.5-4b": 3.6,
    "internvl3.5-8b": 6.95,
    "internvl3.5-14b": 13.2,
    "internvl3.5-38b": 31.2,
}
"""Billions of parameters, by the cards of the language models that they are made of."""

TIED = ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b", "qwen3-vl-4b")
"""Models whose output embeddings are their input embeddings."""

WIDE_VOCABULARY = 152064
"""Of Qwen2 and Qwen2.5 from 7B; smaller ones and Qwen3 have 151 936 tokens."""

IMAGE = Workload((Grid(32, 32),), 64, 15)


def text_part(name: str) -> dict[str, Any]:
    """Return the fields of the text decoder that all of these files have."""
    numbers = dict(zip(KEYS, SHAPES[name], strict=True))
    is_wide = name.startswith("qwen2") and numbers["hidden"] >= 3584
    return {
        "num_hidden_layers": numbers["layers"],
        "hidden_size": numbers["hidden"],
        "num_attention_heads": numbers["heads"],
        "num_key_value_heads": numbers["kv_heads"],
        "intermediate_size": numbers["ffn"],
        "vocab_size": WIDE_VOCABULARY if is_wide else 151936,
        "rms_norm_eps": 1e-6,
    }


def published(name: str) -> PreTrainedConfig:
    """Return the configuration as on the hub: flat for Qwen2(.5)-VL, nested for the others."""
    text, hidden = text_part(name), SHAPES[name][KEYS.index("hidden")]
    is_tied = name in TIED
    if name.startswith("internvl"):
        text |= {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6}
        return InternVLConfig(text_config=text, tie_word_embeddings=is_tied)
    if name.startswith("qwen3"):
        scaling = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
        text |= {"head_dim": 128, "rope_theta": 5e6, "rope_scaling": scaling}
        vision = {"out_hidden_size": hidden}
        return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=is_tied)
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6}
    text |= {"sliding_window": 32768, "use_sliding_window": False}
    text |= {"max_window_layers": text["num_hidden_layers"], "tie_word_embeddings": is_tied}
    if name.startswith("qwen2.5"):
        return Qwen2_5_VLConfig(**text, vision_config={"out_hidden_size": hidden})
    return Qwen2VLConfig(**text, vision_config={"hidden_size": hidden})


@cache
def on_meta(name: str) -> PreTrainedModel:
    """Return the model without its weights' values."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(published(name))


@pytest.mark.parametrize("name", SHAPES)
def test_shape_and_family_are_read_from_the_published_configuration(name: str) -> None:
    config = published(name)
    assert shape_of(config) == ModelShape(*SHAPES[name])
    family = family_of(config)
    assert name in family.aliases
    assert ALIASES[name].startswith(("Qwen/Qwen", "OpenGVLab/InternVL3_5-"))
    assert family.backbone(config).position_axes == (3 if name.startswith("qwen") else 1)


@pytest.mark.parametrize("name", SHAPES)
def test_dense_flops_are_two_per_weight_and_token(name: str) -> None:
    """Compared with the weights of the real architecture, and their number on the model cards."""
    config = published(name)
    model = on_meta(name)
    shape, tokens = shape_of(config), IMAGE.visual
    weights = sum(
        each.numel() for each in model.get_decoder().layers.parameters() if each.dim() == 2
    )
    attention = 4 * tokens**2 * shape.heads * shape.head_dim * shape.layers
    found = dense_visual_flops(shape, IMAGE)
    assert found == 2 * weights * tokens + attention
    assert weights / 1e9 == pytest.approx(NON_EMBEDDING[name], rel=0.01)
    assert type(model).__name__ == family_of(config).architecture


@pytest.mark.parametrize("name", SHAPES)
def test_embeddings_have_the_published_rows_and_are_tied_where_published(name: str) -> None:
    model, (_, hidden, *_) = on_meta(name), SHAPES[name]
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    rows = WIDE_VOCABULARY if name.startswith("qwen2") and hidden >= 3584 else 151936
    assert inputs.weight.shape == outputs.weight.shape == (rows, hidden)
    if name.startswith("internvl"):
        return  # whether theirs are tied is in none of the sources
    model.tie_weights()
    assert (inputs.weight is outputs.weight) == (name in TIED)


@pytest.mark.parametrize("name", SHAPES)
def test_the_rotation_has_the_published_base(name: str) -> None:
    text = published(name).get_text_config()
    rope = text.rope_parameters
    assert rope["rope_theta"] == (5e6 if name.startswith("qwen3") else 1e6)
    if name.startswith("qwen"):
        section = [24, 20, 20] if name.startswith("qwen3") else [16, 24, 24]
        assert (
            rope["mrope_section"] == section
            and 2 * sum(section) == shape_of(published(name)).head_dim
        )


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
