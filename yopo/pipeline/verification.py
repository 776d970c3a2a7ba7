"""``yopo apply --verify``: does a baked checkpoint compute what it should, on one small prompt?

Two properties of the design are checked: in stock transformers the baked model equals the original,
and in yopo it equals the original pruned in memory. The prompt is random pixels and tokens, made
from the configuration, so only the two checkpoints are needed. One model is in memory at a time.
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
"""Random text tokens before the image, and the same number after it."""

_SLACK = 4
"""Error allowed for a stored reordered sum, in units in the last place."""


@dataclass(frozen=True)
class Difference:
    """The difference between two computations of the same logits.

    Attributes:
        largest: Largest absolute difference of two logits.
        relative: Root mean square difference over the root mean square logit.
    """

    largest: float
    relative: float


@dataclass(frozen=True)
class Verification:
    """The result of a verification.

    Attributes:
        dense: The baked checkpoint in stock transformers against the original.
        pruned: The baked checkpoint in yopo against the original, pruned in memory.
        tolerance: Largest relative difference that rounding explains.
        dtype: The checkpoint's dtype, in which everything was computed.
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
        CheckpointError: A weight is missing, or a difference is larger than rounding.
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
        if not each.relative <= tolerance:  # NaN fails, too
            raise CheckpointError(
                f"{baked}: does not compute what {what} does: logits differ by "
                f"{each.relative:.1e} (up to {each.largest:.1e}), expected at most "
                f"{tolerance:.1e} from rounding.",
                remedy="Do not use this checkpoint; please report this as a bug of yopo.",
            )
    return result


def _store_whole(model: PreTrainedModel) -> None:
    """Leave quantisation out: it makes a step of what rounding does where a number lies between two
    levels, and a checkpoint has no part in it."""
    model.get_decoder().yopo.store_whole()


def rounding(dtype: torch.dtype, shape: ModelShape) -> float:
    """Largest relative difference of logits that can be explained by reordered sums.

    Every layer stores two reordered sums in ``dtype``, of up to ``ffn`` terms accumulated in
    float32 (or in ``dtype``, if that is finer); their errors add up like noise.
    """
    stored = _SLACK * torch.finfo(dtype).eps
    accumulated = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * math.sqrt(shape.ffn)
    return (stored + accumulated) * math.sqrt(2 * shape.layers)


def random_prompt(model: PreTrainedModel, plan: PruningPlan) -> dict[str, Any]:
    """One noise image between random text tokens, made from the configuration."""
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
    """(text tokens, vocabulary) float64 logits of text tokens, the only ones a plan preserves."""
    logits = model(**inputs, use_cache=False).logits[0].double()
    return logits[inputs["input_ids"][0] != model.config.image_token_id]
