"""Whether and how a model in memory is pruned, in a few lines."""

from __future__ import annotations

from torch import nn

from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_kv_bytes,
    prefill_flops,
    visual_budget,
    visual_kv_bytes,
)
from yopo.plans.quality import quality_of
from yopo.plans.schema import PruningPlan
from yopo.report import units
from yopo.report.plan_tables import template_of
from yopo.report.quality import quality_words
from yopo.runtime.introspect import plan_of


def describe(model: nn.Module) -> str:
    """Say whether and how a model is pruned.

    Example:
        >>> print(yopo.describe(model))  # doctest: +SKIP
        LlavaForConditionalGeneration, pruned by yopo: llava-tiny at 11.3 % of the visual FLOPs
          prefill with text: 24.2 % of the FLOPs; visual KV cache: 100.0 %, 262.1 kB per prompt
          plan: allocated, visual weight 1, compensation refit; visual tokens pass 8 of 8 layers
          quality: logit KL 0.00802 nats per answer token to the dense model on 64 pairs, ...

    Args:
        model: A transformers model, or any wrapper around one.

    Returns:
        One line for a dense model, four for a pruned one, five with a reduction of visual tokens.
    """
    plan, name = plan_of(model), type(model).__name__
    if plan is None:
        return f"{name}, dense: yopo prunes nothing of it"
    return "\n  ".join([f"{name}, pruned by yopo: {_headline(plan)}", *_details(plan)])


def _headline(plan: PruningPlan) -> str:
    return f"{plan.model.name} at {units.share(visual_budget(plan))} of the visual FLOPs"


def _details(plan: PruningPlan) -> list[str]:
    shape, workload = plan.model.shape, plan.workload
    prefill = prefill_flops(plan) / dense_prefill_flops(shape, workload)
    kept = visual_kv_bytes(plan)
    cache = units.share(kept / dense_visual_kv_bytes(shape, workload))
    named = template_of(plan.provenance) or plan.provenance.get("preset") or "own layers"
    return [
        f"prefill with text: {units.share(prefill)} of the FLOPs; visual KV cache: {cache}, "
        f"{units.num_bytes(kept)} per prompt",
        f"plan: {named}, compensation {plan.compensation}; visual tokens pass {plan.visual_depth} "
        f"of {shape.layers} layers",
        *_reduced(plan),
        f"quality: {quality_words(quality_of(plan))}",
    ]


def _reduced(plan: PruningPlan) -> list[str]:
    if plan.reduction is None:
        return []
    counts = f"{plan.seen.visual} of {plan.workload.visual} per prompt"
    return [f"reduction: {plan.reduction.describe()}, {counts}"]
