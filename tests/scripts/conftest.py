"""Scripts are imported as modules, and timed on a tiny shape."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from yopo.bench import random_model
from yopo.plans.schema import ModelShape

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script() -> Callable[[str], ModuleType]:
    """Import a script by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """The alias of a shape with tiny layers."""
    shape = ModelShape(layers=8, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=160)
    monkeypatch.setitem(random_model.SHAPES, "tiny", shape)
    return "tiny"
