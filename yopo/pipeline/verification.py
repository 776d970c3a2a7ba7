"""``yopo apply --verify``: does a baked checkpoint compute what it should, on one small prompt?

Two properties of the design: in stock transformers the baked model is the original, and in yopo it
is the original pruned in memory. The prompt is random pixels and tokens, made from the
configuration alone, so nothing but the two checkpoints is needed. One model is in memory at a time.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from yopo.models.registry import family_of, resolve
from yopo.plans.schema import ModelShape, PruningPlan
from yopo.runtime.install import pruned
from yopo.serving.loading import load, load_dense
from yopo.support.errors import CheckpointError

_TEXT = 12
"""Random text tokens in front of the image, and as many behind it."""

_SLACK = 4
"""How many units in the last place a reordered sum may be off when it is stored."""


@dataclass(frozen=True)
class Difference:
    """How far two ways of computing the same logits are apart.

    Attributes:
        largest: Largest absolute difference of two logits.
        relative: Root mean square difference over the root mean square logit.
    """

    largest: float
    relative: float


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        dense: The baked checkpoint in stock transformers against the original.
        pruned: The baked checkpoint in yopo against the original, pruned in memory.
        tolerance: Largest relative difference that rounding explains.
        dtype: The checkpoint's, in which everything was computed.
    """

    dense: Difference
    pruned: Difference
    tolerance: float
    dtype: str


def verify(baked: str | Path, original: str | Path, plan: PruningPlan) -> Verification:
    """Compare a baked checkpoint with the original and its plan.

    Args:
        baked: The directory that ``bake`` wrote.
        original: The checkpoint that it was made from.
        plan: The plan that was baked.

    Raises:
        CheckpointError: A weight is missing, or a difference is more than rounding.
    """
    model = load_dense(resolve(str(original)))
    inputs = random_prompt(model, plan)
    dense_logits = _logits(model, inputs)
    with pruned(model, plan):
        _store_whole(model)
        pruned_logits = _logits(model, inputs)
    dtype = model.dtype
    del model  # frees it before the next one is loaded
    dense = difference(_logits(load_dense(resolve(str(baked))), inputs), dense_logits)
    loaded = load(baked)
    _store_whole(loaded)
    found = difference(_logits(loaded, inputs), pruned_logits)
    tolerance = rounding(dtype, plan.model.shape)
    result = Verification(dense, found, tolerance, str(dtype).removeprefix("torch."))
    for each, what in ((dense, "the original model"), (found, "the plan in memory")):
        if not each.relative <= tolerance:  # NaN is no agreement either
            raise CheckpointError(
                f"{baked}: does not compute what {what} does: logits differ by "
                f"{each.relative:.1e} (up to {each.largest:.1e}), rounding explains "
                f"{tolerance:.1e}.",
                remedy="Do not use this checkpoint; please report this as a bug of yopo.",
            )
    return result


def _store_whole(model: PreTrainedModel) -> None:
    """Leave quantisation out: it makes a step of what rounding does where a number lies between two
    levels, and a checkpoint has no part in it."""
    model.get_decoder().yopo.store_whole()


def rounding(dtype: torch.dtype, shape: ModelShape) -> float:
    """Largest relative difference of logits that reordering sums explains.

    Every layer stores two reordered sums in ``dtype``, of up to ``ffn`` terms accumulated in
    float32 (or in ``dtype``, if that is finer); their errors add up like noise.
    """
    stored = _SLACK * torch.finfo(dtype).eps
    accumulated = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * math.sqrt(shape.ffn)
    return (stored + accumulated) * math.sqrt(2 * shape.layers)


def random_prompt(model: PreTrainedModel, plan: PruningPlan) -> dict[str, Any]:
    """One image of noise between random text tokens, from the configuration alone."""
    config, family = model.config, family_of(model.config)
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    special = {*family.token_ids(config), config.get_text_config().pad_token_id}
    words = torch.randint(vocabulary, (64 * _TEXT,), generator=generator).tolist()
    words = [word for word in words if word not in special][: 2 * _TEXT]
    count, image = family.noise(config, plan.workload.grids[0], generator)
    ids = torch.tensor([[*words[:_TEXT], *[config.image_token_id] * count, *words[_TEXT:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    for name, value in image.items():
        inputs[name] = value.to(model.dtype) if value.is_floating_point() else value
    return inputs


def difference(found: torch.Tensor, expected: torch.Tensor) -> Difference:
    """Compare logits, (text tokens, vocabulary) float64."""
    error = found - expected
    scale = expected.square().mean().sqrt().clamp(min=1e-30)
    return Difference(
        largest=error.abs().max().item(), relative=(error.square().mean().sqrt() / scale).item()
    )


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits of the text tokens, (text tokens, vocabulary) float64: all that plans promise."""
    logits = model(**inputs, use_cache=False).logits[0].double()
    return logits[inputs["input_ids"][0] != model.config.image_token_id]
