"""Decoders on two devices compute what they compute on one, and mix no devices, in every family."""

from __future__ import annotations

from itertools import islice
from typing import Any

import tiny
import torch
from devices import pretended, spread
from zoo import PROMPTS, Specimen

from yopo.calibration.observers import observing
from yopo.data.prompts import Batch
from yopo.fitting.layerwise import enter
from yopo.fitting.profile import profile
from yopo.fitting.refit import refit
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned

ROWS = PROMPTS["padded, different images"]


def stored_plans(specimen: Specimen) -> list[PruningPlan]:
    """Plans that read visual tokens on the second device: stored whole, in few bits, as latents."""
    plans = map(specimen.plan, range(30))
    reading = (plan for plan in plans if any(layer.read_heads for layer in plan.layers[2:]))
    first, second, third = islice(reading, 3)
    return [first, tiny.in_few_bits(second, 1), tiny.as_latents(third, 1)]


def test_a_spread_decoder_is_the_one_on_one_device(specimen: Specimen) -> None:
    inputs = specimen.inputs(ROWS)
    with pretended() as places:
        whole, halves = (spread(specimen.model, *each) for each in ((0,), (0, 1)))
        for plan in stored_plans(specimen):
            found = []
            for model in (whole, halves):
                with torch.no_grad(), pruned(model, plan, check=False):
                    model(**inputs)  # head positions are moved once
                    places.moves.clear()
                    logits = model(**inputs).logits
                    crossed = [move for move in places.moves if move[:2] == ("cuda:0", "cuda:1")]
                    found.append((logits, specimen.generate(model, inputs), crossed))
            assert torch.equal(found[0][0], found[1][0])
            assert torch.equal(found[0][1], found[1][1])
            assert not found[0][2]
            # Two streams, rotary positions, places and padding: once for all layers.
            assert 2 <= len(found[1][2]) <= 16, found[1][2]


def images(specimen: Specimen) -> list[Batch]:
    rows = [PROMPTS["one image"], PROMPTS["two images"]]
    return [Batch(specimen.inputs(each), None, ()) for each in rows]


def measured(specimen: Specimen, model: Any) -> list[torch.Tensor]:
    """Statistics, profile and fitted weights."""
    batches, found = images(specimen), []
    with torch.no_grad(), observing(model, specimen.identity.shape, specimen.family) as observer:
        for batch in batches:
            observer.begin(batch.inputs["attention_mask"])
            model.base_model(**batch.inputs, use_cache=False)
            part = observer.finish()
            found += [*part.sums.values(), *part.rho]
    entered = enter(model, batches)
    found += vars(profile(model, entered, specimen.identity.shape)).values()
    plan = specimen.plan(3, baked=False, compensation="refit", bidirectional=False)
    (weights,) = refit(model, entered, [plan])
    return found + [each for layer in weights.values() for each in layer.values()]


def test_a_spread_decoder_is_measured_and_fitted_as_on_one_device(specimen: Specimen) -> None:
    with pretended():
        whole, halves = (
            measured(specimen, spread(specimen.model, *each)) for each in ((0,), (0, 1))
        )
        for one, other in zip(whole, halves, strict=True):
            assert torch.equal(one, other)
