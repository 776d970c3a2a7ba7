"""The first layer of this demo model raises the energy of visual states by four decades."""

from __future__ import annotations

import pytest

from yopo.calibration.measure import measure
from yopo.data.prompts import batches, encode_for, load_processor
from yopo.data.sources import open_pairs
from yopo.fitting.fitter import Fitter
from yopo.models.registry import resolve
from yopo.planning.allocate import Allocator
from yopo.planning.templates import TemplateBuilder
from yopo.planning.weightings import Weighting
from yopo.serving.loading import load_dense


@pytest.mark.parametrize("budget", [0.05, 0.12])
def test_the_first_layer_does_not_take_the_whole_budget(budget: float) -> None:
    source = resolve("internvl-tiny")
    processor, model = load_processor(source.location), load_dense(source)
    pairs = list(open_pairs("demo:tickets-calibration", samples=32, seed=0))
    statistics = measure(model, processor, pairs, name=source.name, batch_size=32)
    fitter = Fitter(
        model, lambda: [encode_for(model, processor, group) for group in batches(pairs, 32)]
    )
    assert fitter.profile.stream[1] > 1000 * fitter.profile.stream[0]
    weighting = Weighting.even(10.0, None, statistics.model.shape.layers)
    layers = Allocator(TemplateBuilder(statistics, budget), fitter.profile, weighting).allocate()
    assert layers is not None and all(layer.read_heads for layer in layers)
