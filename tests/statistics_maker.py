"""Made-up statistics of a small model, for tests that need no model."""

from __future__ import annotations

import torch

from yopo.calibration.statistics import MAX_DISTANCE, Statistics
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelIdentity, ModelShape, Workload


def make(
    seed: int = 0,
    *,
    layers: int = 8,
    heads: int = 8,
    kv_heads: int = 8,
    samples: int = 6,
    shape: ModelShape | None = None,
    family: str = "llava",
    workload: Workload | None = None,
) -> Statistics:
    """Make random statistics; dimensions are LLaVA-like in proportion unless given."""
    generator = torch.Generator().manual_seed(seed)
    shape = shape or ModelShape(layers, 16 * heads, heads, kv_heads, 16, 43 * heads)
    layers, heads = shape.layers, shape.heads

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    return Statistics(
        model=ModelIdentity("made-up", family, shape, "f" * 64),
        workload=workload or Workload((Grid(8, 8),), 20, 4),
        rho=draw(samples, layers, heads).float(),
        neuron_square=draw(layers, shape.ffn) * 100,
        neuron_sum=draw(layers, shape.ffn),
        head_sum=draw(layers, heads, shape.head_dim),
        head_effect_sum=draw(layers, heads),
        text_norm_sum=draw(layers) + 1,
        cross_modal_sum=draw(layers),
        locality_sum=draw(layers, MAX_DISTANCE + 2),
        key_square_sum=torch.zeros(layers, shape.kv_heads, shape.head_dim, dtype=torch.float64),
        down_norm=draw(layers, shape.ffn),
        visual_tokens=64 * samples,
        text_queries=10 * samples + seed,
        provenance={"samples": samples, "pairs": "made-up", "seed": seed},
    )
