"""On the demo model, a head's effect is a better score than how much it looks at the image."""

from __future__ import annotations

from dataclasses import replace

import torch

from yopo.calibration.measure import measure
from yopo.data.prompts import load_processor
from yopo.data.sources import open_pairs
from yopo.evaluation.fidelity import compare, record_dense
from yopo.models.registry import resolve
from yopo.planning.paper import kept_heads
from yopo.plans.schema import LayerPlan, full_plan
from yopo.runtime.install import pruned
from yopo.serving.loading import load_dense
from yopo.strategies.heads import score, select_top


def test_selecting_heads_by_effect_gives_a_lower_kl_than_by_rho() -> None:
    """Half of all heads may read; all other work of visual tokens is frozen."""
    source = resolve("llava-tiny")
    processor, model = load_processor(source.location), load_dense(source)
    pairs = list(open_pairs("demo:calibration", samples=128, seed=0))
    statistics = measure(model, processor, pairs, name=source.name, batch_size=32)
    records = record_dense(model, processor, pairs, batch_size=32, max_new_tokens=8)
    dense = full_plan(statistics.model, statistics.workload)

    def kl(scores: torch.Tensor) -> float:
        keep = select_top(scores, scores.numel() // 2)
        reads = LayerPlan((), attend_heads=(), radius=None, neurons=0)
        layers = [replace(reads, read_heads=kept_heads(row)) for row in keep]
        with pruned(model, dense.with_layers(layers)):
            return compare(model, records).kl

    by_effect, by_rho = kl(statistics.head_effect), kl(score(statistics.rho))
    print(f"logit KL {by_effect:.2f} by effect, {by_rho:.2f} by rho")
    assert by_effect < 0.7 * by_rho
