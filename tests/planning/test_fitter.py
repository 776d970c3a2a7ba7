"""A fit that runs out of memory suggests a remedy."""

from __future__ import annotations

from collections.abc import Iterable
from unittest.mock import Mock

import pytest
import torch

from yopo.data.prompts import Batch
from yopo.fitting import fitter as module
from yopo.fitting.fitter import Fitter
from yopo.support.errors import YopoError


@pytest.mark.parametrize("what", ["enter", "profile", "refit"])
def test_out_of_memory_names_the_pairs_and_the_lever(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(_: object, batches: Iterable[Batch], *others: object) -> None:
        list(batches)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "enter", lambda model, batches, reduction, room: list(batches))
    monkeypatch.setattr(module, what, fail)
    monkeypatch.setattr(module, "shape_of", lambda config: None)
    monkeypatch.setattr(module, "offload_option", lambda model: "--offload always")
    batches = [Batch({}, None, (None,) * size) for size in (8, 3)]
    fitter = Fitter(Mock(dtype=torch.float32), lambda: batches)
    said = "up to the first layer" if what == "enter" else "of 11 pairs"
    with pytest.raises(YopoError, match=said) as caught:
        fitter.profile if what == "profile" else fitter.fit([Mock()])  # noqa: B018
    remedy = "Use --offload always (with --work-dir, if host memory is full), fewer --fit-pairs, "
    assert caught.value.remedy == f"{remedy}--dtype bfloat16, or --compensation none."
