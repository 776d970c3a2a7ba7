"""A specimen of every entry of the zoo."""

from __future__ import annotations

import pytest
import zoo


@pytest.fixture(scope="module", params=list(zoo.all_entries()), ids=lambda entry: entry.name)
def specimen(request: pytest.FixtureRequest) -> zoo.Specimen:
    """A tiny model with its float64 oracle."""
    return zoo.build(request.param)
