"""A specimen of every kind of decoder, and calibration batches for it."""

from __future__ import annotations

import pytest
import specimens
import zoo

from yopo.data.prompts import Batch


@pytest.fixture(scope="module", params=specimens.ENTRIES, ids=lambda entry: entry.name)
def specimen(request: pytest.FixtureRequest) -> zoo.Specimen:
    """Ragged GQA with biases, MHA, M-RoPE, DeepStack with norms per head, fused projections."""
    return zoo.build(request.param)


@pytest.fixture
def batches(specimen: zoo.Specimen) -> list[Batch]:
    """Padded prompts with different images, and one row without any."""
    prompts = ("one image", "padded, different images", "one without")
    return specimens.make_batches(specimen, [zoo.PROMPTS[name] for name in prompts])
