"""Shared by all tests: one thread, no network, reproducible hypothesis runs, tiny models."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import tiny
import torch
from hypothesis import settings
from tape import at_once, tape  # noqa: F401

torch.set_num_threads(1)
settings.register_profile("yopo", derandomize=True, deadline=None, database=None)
settings.load_profile("yopo")


def pytest_collection_finish() -> None:
    """Libraries and tests stay; whoever collects garbage need not look through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def subject(request: pytest.FixtureRequest) -> tiny.Subject:
    """A tiny LLaVA for every supported kind of decoder, with its float64 oracle."""
    return tiny.make_subject(request.param)


@pytest.fixture(scope="module")
def mha() -> tiny.Subject:
    """The multi-head one only, for tests where the kind of decoder does not matter."""
    return tiny.make_subject("mha")
