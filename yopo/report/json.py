"""A plan as one JSON document: everything that the tables show, unrounded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from yopo.plans.evaluated import evaluated_of
from yopo.plans.flops import visual_flops_of_layer, visual_kv_bytes_of_layer
from yopo.plans.quality import quality_of
from yopo.plans.schema import PruningPlan
from yopo.plans.servable import engine_problem
from yopo.report.plan_tables import savings

_KEYS = ("visual_flops", "prefill_flops", "visual_kv_bytes")


def plan_document(plan: PruningPlan) -> dict[str, Any]:
    """Describe a plan as plain values.

    Returns:
        ``model``, ``workload``, ``budget``, ``compensation``, ``bidirectional``, ``baked``;
        ``servable``, whether ``vllm`` can run it and, if not, ``because`` of what;
        ``visual_flops``, ``prefill_flops`` and ``visual_kv_bytes`` (16 bit) of one prompt, each
        with ``dense``, ``pruned`` and ``ratio``; ``layers``; ``measured`` (or null);
        ``quality``: what calibration measured, and ``evaluated``: what an evaluation found (or
        null); ``provenance``.
    """
    shape, workload, found = plan.model.shape, plan.workload, quality_of(plan)
    evaluated = evaluated_of(plan)
    layers = [
        {
            "index": index,
            **asdict(layer),
            "visual_flops": visual_flops_of_layer(layer, shape, plan.seen),
            "visual_kv_bytes": visual_kv_bytes_of_layer(layer, shape, plan.seen),
        }
        for index, layer in enumerate(plan.layers)
    ]
    problem = engine_problem(plan)
    totals = {
        key: {"dense": dense, "pruned": pruned, "ratio": pruned / dense}
        for key, (_, dense, pruned, _) in zip(_KEYS, savings(plan), strict=True)
    }
    return {
        "model": plan.model.to_dict(),
        "workload": {**asdict(workload), "visual": workload.visual},
        "budget": asdict(plan.budget),
        "compensation": plan.compensation,
        "bidirectional": plan.bidirectional,
        "baked": plan.baked,
        "servable": {"vllm": problem is None, "because": problem},
        **totals,
        "layers": layers,
        "measured": None if plan.measured is None else asdict(plan.measured),
        "quality": None if found is None else found.to_dict(),
        "evaluated": None if evaluated is None else vars(evaluated),
        "provenance": dict(plan.provenance),
    }
