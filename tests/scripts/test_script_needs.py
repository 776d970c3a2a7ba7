"""The estimate of a calibration is near to what it takes."""

from __future__ import annotations

import pytest
from needs import main


@pytest.mark.parametrize(
    "words",
    [
        "--layers 8 --hidden 1024 --samples 8 --request --preset=yopo-25",
        "--layers 1 --hidden 256 --side 16 --samples 32 --offload always --batch-size 4",
    ],
)
def test_memory_is_near_to_what_is_said(words: str) -> None:
    given = words.split()
    if "--request" not in given:
        given += ["--request", "--budget 0.2 --template reader --compensation refit"]
    else:
        place = given.index("--request")
        given = [*given[:place], "--request=--preset yopo-25"]
    [found] = main(given)
    assert 0.7 < found.said_bytes / found.bytes < 1.6
