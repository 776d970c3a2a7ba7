"""Where layers stay on disk, a calibration needs no more of a GPU's memory for more pairs.

Skipped without CUDA.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from yopo.calibration.measure import measure
from yopo.data.sources import open_pairs
from yopo.evaluation.fidelity import compare, record_dense
from yopo.fitting.fitter import Fitter
from yopo.fitting.states import room_for
from yopo.models import turns
from yopo.models.offloaded import is_offloaded
from yopo.pipeline.encoded import encoded
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.options import RunOptions
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest
from yopo.runtime.install import pruned

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

BATCH = 8


def test_memory_does_not_grow_with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "free_for_states", lambda device: 0)  # windows of one batch
    options = RunOptions(device="cuda", offload="always")
    handle = ModelHandle("llava-tiny", None, options)
    model = handle.model
    assert is_offloaded(model.get_decoder())
    _, few, many = (dict(memory(handle, count)) for count in (8, 8, 64))  # first, workspaces
    for name, size in many.items():  # prompts are not all of one length
        assert size <= 1.25 * few[name] + (1 << 16), (name, few, many)


def memory(handle: ModelHandle, count: int) -> Iterator[tuple[str, int]]:
    """Bytes that each pass needs at most, and that all results hold, beside the model."""
    model, processor = handle.model, handle.processor
    pairs = list(open_pairs("demo:calibration", samples=count, seed=0))
    before = torch.cuda.memory_allocated()
    room = room_for(model, None)

    def sizes(name: str) -> Iterator[tuple[str, int]]:
        gc.collect()
        yield f"{name}, held", torch.cuda.memory_allocated() - before
        yield f"{name}, peak", torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()

    torch.cuda.reset_peak_memory_stats()
    found = measure(model, processor, pairs, name="llava-tiny", batch_size=BATCH)
    yield from sizes("statistics")
    records = record_dense(model, processor, pairs, batch_size=BATCH, max_new_tokens=2, room=room)
    yield from sizes("answers")
    fitter = Fitter(model, lambda: encoded(model, processor, pairs, BATCH), room=room)
    assert fitter.profile.stream.isfinite().all()
    yield from sizes("profile")
    request = BudgetRequest(0.25, template="reader", compensation="none")
    plan = replace(make_plan(found, request)[0], compensation="refit")
    (plan,) = fitter.fit([plan])
    assert plan.tensors.refit
    yield from sizes("fit")
    with pruned(model, plan, check=False):
        assert compare(model, records).kl > 0
    yield from sizes("comparison")
