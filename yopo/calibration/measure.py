"""The calibration pass: runs pairs through the dense model and returns statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from yopo.calibration.observers import Observer, observing
from yopo.calibration.running import Running
from yopo.calibration.statistics import Statistics
from yopo.data.pairs import Pair
from yopo.data.prompts import batches, encode_for
from yopo.data.sizes import by_size
from yopo.models.family import shape_of
from yopo.models.fingerprint import fingerprint_of_decoder
from yopo.models.offloaded import at_hand, less_memory, named_weights
from yopo.models.registry import family_of
from yopo.models.turns import in_turns
from yopo.plans.extent import Extent
from yopo.plans.schema import ModelIdentity, ModelShape
from yopo.reduction.method import Method
from yopo.support.console import track
from yopo.support.errors import DataError
from yopo.support.finite import check_weights
from yopo.support.out_of_memory import memory_for
from yopo.support.ranks import is_together, shared
from yopo.support.work_dir import NoWork, Work

SNAPSHOT = "statistics-part"
"""Name of the stage that holds the sums over the pairs so far."""

PERIOD = 20.0
"""Seconds after which sums are kept."""


def identify(model: PreTrainedModel, name: str) -> ModelIdentity:
    """Identity of a dense model in memory; ``name`` is the user's name for it.

    Raises:
        ModelError: No registered family, or an unsupported text decoder or vision tower.
    """
    family = family_of(model.config)
    family.check_vision(model.config)
    family.backbone(model.config)
    fingerprint = fingerprint_of_decoder(model.get_decoder())
    return ModelIdentity(name, family.name, shape_of(model.config), fingerprint)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Iterable[Pair],
    *,
    name: str,
    total: int | None = None,
    batch_size: int = 8,
    queries: str = "text",
    reduction: Method | None = None,
    provenance: Mapping[str, Any] | None = None,
    work: Work | None = None,
) -> Statistics:
    """Run pairs through a dense model once and measure everything that plans need.

    Args:
        model: A multimodal model of a supported family, in eval mode.
        processor: Its processor.
        pairs: Image-question pairs; only prompts are used, not answers.
        name: The model's name in plans.
        total: Expected number of pairs, for the progress bar.
        batch_size: Pairs per forward.
        queries: Queries that head activity sums over: ``text``, ``all`` or ``last``.
        reduction: Drops visual tokens before the first layer: those that are left are measured.
        provenance: Added to the statistics' provenance.
        work: Keeps the sums now and then, so that a killed pass goes on from them.

    Raises:
        DataError: No pairs, or one that cannot be read.
        ModelError: A weight, and thus what is measured, is not finite.
        YopoError: Out of memory; says what needs less.
    """
    identity = identify(model, name)
    family = family_of(model.config)
    groups = batches(by_size(pairs), batch_size)
    groups = track(groups, label="calibrating", total=total, unit="pairs")
    keeper = _Keeper(identity.shape, work or NoWork())
    rest = (group for group in groups if not keeper.has(group))
    ways = less_memory(model, batch_size)
    with (
        memory_for(f"measuring statistics, {batch_size} pairs per batch", *ways),
        observing(model, identity.shape, family, queries, reduction) as observer,
    ):
        for part in _parts(model, rest, partial(_observe, model, processor, observer, name)):
            keeper.add(part)
        if not keeper.total.rho:
            raise DataError("There are no pairs to calibrate on.")
        about = {"queries": queries, **(provenance or {})}
        return replace(_conclude(model, identity, keeper.total, about), reduction=reduction)


def _parts(
    model: PreTrainedModel,
    groups: Iterable[tuple[Pair, ...]],
    observe: Callable[[tuple[Pair, ...]], Running],
) -> Iterator[Running]:
    """The sums of each batch, in order: of several at a time, by several processes or in turns."""
    if is_together():
        yield from shared(groups, observe)
        return
    for finished in in_turns(model, lambda _, group: observe(group), groups):
        yield from finished.results


class _Keeper:
    """The sums over all pairs, kept now and then; the first pairs may already be in them."""

    def __init__(self, shape: ModelShape, work: Work):
        self.total, self._work, self._kept = Running(shape), work, time.monotonic()
        found = work.load(SNAPSHOT)
        self._done = 0
        if found is not None:
            self.total.restore(found)
            self._done = found.about["pairs"]

    def has(self, group: tuple[Pair, ...]) -> bool:
        """Whether the next pairs are in the sums."""
        self._done -= len(group)
        return self._done >= 0

    def add(self, part: Running) -> None:
        """Add the sums over a batch; keep those over all, if the last ones are old."""
        self.total.add(part)
        if time.monotonic() - self._kept >= PERIOD:
            self._work.save(SNAPSHOT, self.total.snapshot())
            self._kept = time.monotonic()


def _observe(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    observer: Observer,
    name: str,
    group: tuple[Pair, ...],
) -> Running:
    """The sums over a batch."""
    batch = encode_for(model, processor, group)
    observer.begin(batch.inputs["attention_mask"])
    model.base_model(**batch.inputs, use_cache=False)
    try:
        return observer.finish()
    except DataError:
        check_weights(named_weights(model), name)
        raise


def _conclude(
    model: PreTrainedModel, identity: ModelIdentity, total: Running, provenance: dict[str, Any]
) -> Statistics:
    rho = torch.cat(total.rho)
    names = family_of(model.config).backbone(model.config)
    norms = []
    for layer in model.get_decoder().layers:
        with at_hand(layer):
            weight = getattr(layer.mlp, names.down).weight.detach()
            norms.append(weight.double().square().sum(dim=0).cpu())
    grids = max(total.grids.items(), key=lambda entry: (entry[1], len(entry[0])))[0]
    samples = len(rho)
    text, before = round(total.text_tokens / samples), round(total.text_before / samples)
    workload = total.inner_text[grids].within(grids, text, before)
    sums: dict[str, Any] = total.sums
    return Statistics(
        model=identity,
        workload=workload,
        rho=rho,
        down_norm=torch.stack(norms),
        visual_tokens=total.visual_tokens,
        text_queries=total.text_queries,
        provenance={"samples": samples, **provenance},
        extent=Extent.of(total.grids),
        **sums,
    )
