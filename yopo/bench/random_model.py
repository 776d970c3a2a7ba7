"""Models of published shapes with random weights, so that 7B layers can be timed anywhere.

The decoder has the plan's full width; the rest is a tiny vision tower that is never called (image
features are made up, and passed in as when ``generate`` encodes images first) and a tiny
vocabulary. transformers' own model runs under ``yopo.pruned``, nothing is simulated. Every layer
has separate weights in memory: shared ones would stay in CPU caches.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from yopo.bench.plans import made_up_refit, preset_plan
from yopo.models.devices import free_memory
from yopo.models.family import GridsOf
from yopo.plans.grid import Grid
from yopo.plans.made_up import MADE_UP
from yopo.plans.schema import ModelIdentity, ModelShape, PruningPlan, Workload
from yopo.support.errors import ModelError, suggest

SHAPES: dict[str, ModelShape] = {
    "llava-1.5-7b": ModelShape(32, 4096, 32, 32, 128, 11008),
    "llava-1.5-13b": ModelShape(40, 5120, 40, 40, 128, 13824),
}
"""Published decoders, by alias."""

WORKLOAD = Workload((Grid(24, 24),), text=64, text_before=5)
"""LLaVA-1.5's image in a short prompt, preceded by ``<s>USER: ``."""

FAMILY = "llava"
"""Family of every random model: a Llama decoder substitutes those of other families."""

VOCABULARY, IMAGE_TOKEN = 128, 127

_BLOCK = 1 << 20
"""Random values drawn per model; weights are copies of this block at different offsets."""

_SCALE = 0.02
_MARGIN = 1.25
"""Required memory over that of the weights."""


def published_model(name: str) -> ModelIdentity:
    """The identity of a published model's shape, without its weights.

    Raises:
        ModelError: The name is none of ``SHAPES``.
    """
    if name not in SHAPES:
        raise ModelError(f"No published shape named '{name}'.", remedy=suggest(name, SHAPES))
    return ModelIdentity(name, FAMILY, SHAPES[name], MADE_UP)


def published_plan(preset: str, name: str) -> PruningPlan:
    """A preset for a published shape: to be timed, as its heads and neurons were not measured.

    Raises:
        YopoError: There is no such preset, or no such shape.
    """
    return preset_plan(preset, published_model(name), WORKLOAD)


def random_model(
    shape: ModelShape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    side: int = 1,
) -> PreTrainedModel:
    """A LLaVA on a Llama decoder of this shape, with random weights.

    Args:
        shape: The decoder's dimensions.
        dtype: Dtype of the weights.
        device: Device of the weights.
        side: Visual tokens per row and column of an image, for prompts with pixels.

    Raises:
        ModelError: The weights would not fit into the device's free memory.
    """
    _check_memory(shape, dtype, device)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            num_hidden_layers=1,
            num_attention_heads=1,
            hidden_size=8,
            intermediate_size=8,
            image_size=8 * side,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=1 << 16,
            tie_word_embeddings=False,
            pad_token_id=0,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=side**2,
        vision_feature_layer=-1,
    )
    with no_init_weights(), torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
        nn.Module.to(model, dtype)  # in place; transformers' own `to` has no usable type
    model = model.to_empty(device=device).eval()
    _restore_buffers(model, config, device)
    _fill(model)
    return model


def _restore_buffers(model: PreTrainedModel, config: LlavaConfig, device: str) -> None:
    """Compute what ``to_empty`` lost: rotary frequencies, and the vision tower's positions."""
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config.text_config).to(device)
    for module in model.model.vision_tower.modules():
        if hasattr(module, "position_ids"):
            module.position_ids.copy_(torch.arange(module.position_ids.shape[1]))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Fill every parameter with random values, norms with ones."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_BLOCK, generator=generator) * _SCALE
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" in name:
            parameter.fill_(1.0)
            continue
        block = values.roll(7919 * number).to(parameter)
        flat = parameter.view(-1)
        for start in range(0, len(flat), _BLOCK):
            piece = flat[start : start + _BLOCK]
            piece.copy_(block[: len(piece)])


def fitted(plan: PruningPlan) -> PruningPlan:
    """A plan for the random model: of its family, with missing fitted weights made up."""
    plan = replace(plan, model=replace(plan.model, family=FAMILY, fingerprint=MADE_UP))
    if plan.compensation == "refit" and not plan.tensors.refit:
        plan = replace(plan, tensors=replace(made_up_refit(plan), key_scale=plan.tensors.key_scale))
    if plan.needs_key_scale and plan.tensors.key_scale is None:
        shape = plan.model.shape
        ones = torch.ones(shape.layers, shape.kv_heads, shape.head_dim)
        plan = replace(plan, tensors=replace(plan.tensors, key_scale=ones))
    return plan


def grids_of(plan: PruningPlan) -> GridsOf:
    """A function that locates the images of the plan's prompt, for any grids."""
    return lambda config, rows, images: [plan.workload.grids] * len(rows)


def _check_memory(shape: ModelShape, dtype: torch.dtype, device: str) -> None:
    width = 2 * shape.hidden * (shape.heads + shape.kv_heads) * shape.head_dim
    needed = shape.layers * (width + 3 * shape.hidden * shape.ffn) * dtype.itemsize
    free = free_memory(torch.device(device))
    if free is not None and needed * _MARGIN > free:
        raise ModelError(
            f"{shape.layers} random layers need {needed / 1e9:.1f} GB, but only "
            f"{free / 1e9:.1f} GB of {device} memory are free.",
            remedy="Time fewer of them (--layers 4), or use --dtype bfloat16.",
        )
