"""Grids given to encoders belong to the thread that encodes the images, in every family."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
import zoo

from yopo.runtime.install import pruned

ROWS = ([[1, 5, "A", 6, 7]], [[1, "B", 6, 7]], [[1, 2, "A", "B", 8, 9]])
PATIENCE = 60.0
ENTRIES = {type(entry).__module__: entry for entry in zoo.all_entries()}
"""One model per module of the zoo."""


@pytest.mark.parametrize("module", ENTRIES)
def test_concurrently_encoded_images_are_not_mixed_up(module: str) -> None:
    """All threads encode before any of them prefills, as two calls of ``generate`` may."""
    specimen = zoo.build(ENTRIES[module])
    plan = specimen.plan(3)
    batches = [specimen.inputs(rows, seed) for seed, rows in enumerate(ROWS)]
    barrier = threading.Barrier(len(batches), timeout=PATIENCE)

    def prefill(inputs: dict) -> torch.Tensor:
        barrier.wait()
        said = specimen.generate(
            specimen.model,
            inputs,
            max_new_tokens=1,
            min_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return said.logits[0]

    with pruned(specimen.model, plan):
        expected = [tiny.logits(specimen.model, each)[:, -1] for each in batches]
        handle = specimen.model.base_model.register_forward_pre_hook(lambda *_: meet(barrier))
        try:
            with ThreadPoolExecutor(len(batches)) as pool:
                found = list(pool.map(prefill, batches))
        finally:
            handle.remove()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def meet(barrier: threading.Barrier) -> None:
    """Wait until every thread has encoded its images."""
    barrier.wait()
