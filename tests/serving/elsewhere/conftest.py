"""Shared by the tests of evaluation tools."""

from __future__ import annotations

import pytest
from damaged_model import Damaged


@pytest.fixture(scope="session")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    return Damaged.make(tmp_path_factory.mktemp("damaged"))
