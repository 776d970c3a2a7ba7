"""Text decoders of LLaVA-OneVision, Pixtral, Mistral 3, Idefics3 and SmolVLM have published sizes.

Shapes are those of the language models that they are built on (Qwen2, Mistral Nemo, Mistral Small
3.1, Llama 3, SmolLM2), from memory; what confirms them is the number of parameters, which the cards
of these models state. That of Mistral Small 3.1 is also the default of ``Mistral3Config``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Mistral3Config, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from yopo.models.family import shape_of
from yopo.models.registry import ALIASES, family_of
from yopo.plans.schema import ModelShape

SHAPES = {
    "llava-onevision-0.5b": ModelShape(24, 896, 14, 2, 64, 4864),
    "llava-onevision-7b": ModelShape(28, 3584, 28, 4, 128, 18944),
    "llava-onevision-72b": ModelShape(80, 8192, 64, 8, 128, 29568),
    "pixtral-12b": ModelShape(40, 5120, 32, 8, 128, 14336),
    "mistral-small-3.1-24b": ModelShape(40, 5120, 32, 8, 128, 32768),
    "idefics3-8b": ModelShape(32, 4096, 32, 8, 128, 14336),
    "smolvlm-2.2b": ModelShape(24, 2048, 32, 32, 64, 8192),
    "smolvlm2-256m": ModelShape(30, 576, 9, 3, 64, 1536),
    "smolvlm2-500m": ModelShape(32, 960, 15, 5, 64, 2560),
    "smolvlm2-2.2b": ModelShape(24, 2048, 32, 32, 64, 8192),
}
LANGUAGE_MODELS: dict[str, tuple[str, int, bool, float]] = {
    "llava-onevision-0.5b": ("qwen2", 151936, True, 0.49),
    "llava-onevision-7b": ("qwen2", 152064, False, 7.61),
    "llava-onevision-72b": ("qwen2", 152064, False, 72.7),
    "pixtral-12b": ("mistral", 131072, False, 12.2),
    "mistral-small-3.1-24b": ("mistral", 131072, False, 23.6),
    "idefics3-8b": ("llama", 128256, False, 8.03),
    "smolvlm-2.2b": ("llama", 49152, True, 1.71),
    "smolvlm2-256m": ("llama", 49152, True, 0.135),
    "smolvlm2-500m": ("llama", 49152, True, 0.362),
    "smolvlm2-2.2b": ("llama", 49152, True, 1.71),
}
"""Kind, vocabulary, whether embeddings are tied, and billions of parameters of the language model
alone, whose vocabulary lacks the few tokens that a multimodal model adds."""


def text_config(name: str) -> dict[str, Any]:
    shape = SHAPES[name]
    kind, vocabulary, is_tied, _ = LANGUAGE_MODELS[name]
    found = {
        "model_type": kind,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn,
        "vocab_size": vocabulary,
        "tie_word_embeddings": is_tied,
    }
    return found if kind == "qwen2" else found | {"head_dim": shape.head_dim}


def published(name: str) -> PreTrainedConfig:
    (family,) = {each for each, alias in FAMILY_OF.items() if name in alias}
    extra = {"vision_config": {"model_type": "pixtral"}} if name == "pixtral-12b" else {}
    if extra:
        extra |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    return CONFIG_MAPPING[family](text_config=text_config(name), **extra)


FAMILY_OF = {
    "llava_onevision": ("llava-onevision-0.5b", "llava-onevision-7b", "llava-onevision-72b"),
    "llava": ("pixtral-12b",),
    "mistral3": ("mistral-small-3.1-24b",),
    "idefics3": ("idefics3-8b", "smolvlm-2.2b"),
    "smolvlm": ("smolvlm2-256m", "smolvlm2-500m", "smolvlm2-2.2b"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_is_read_from_the_configuration(name: str) -> None:
    config = published(name)
    family = family_of(config)
    assert shape_of(config) == SHAPES[name]
    assert name in family.aliases and name in ALIASES
    assert family.backbone(config).query == "q_proj"
    family.check_vision(config)


@pytest.mark.parametrize("name", SHAPES)
def test_the_language_model_has_the_published_number_of_parameters(name: str) -> None:
    kind, *_, billions = LANGUAGE_MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**text_config(name)))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.01)


def test_mistral_small_is_the_default_of_its_configuration() -> None:
    assert shape_of(Mistral3Config()) == SHAPES["mistral-small-3.1-24b"]
