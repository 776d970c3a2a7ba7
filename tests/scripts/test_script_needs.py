"""The estimate of a calibration is near to what it takes."""

from __future__ import annotations

import pytest
from needs import main

WEIGHTS = ["--layers", "8", "--hidden", "1024", "--samples", "8", "--request=--preset yopo-25"]
STATES = ["--layers", "1", "--hidden", "256", "--side", "16", "--samples", "32"]
FIT = "--request=--budget 0.2 --template reader --compensation refit"


@pytest.mark.parametrize("words", [WEIGHTS, [*STATES, "--offload", "always", FIT]])
def test_memory_is_near_to_what_is_said(words: list[str]) -> None:
    [found] = main(words)
    assert 0.6 < found.said_bytes / found.bytes < 1.9  # small: what libraries take counts
    assert found.own_bytes <= found.bytes
    assert 0 < found.said_seconds < 60
