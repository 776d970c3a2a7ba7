"""Every file in configs/ is a calibration that the command line accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from yopo.cli.calibrate import command
from yopo.cli.config import load_config
from yopo.cli.options import run_settings, wishes
from yopo.models.registry import ALIASES, resolve

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DTYPES = {True: ("float32",), False: ("float16", "bfloat16")}
"""Of the demo model, and of published checkpoints."""


def test_there_is_one_per_model() -> None:
    assert {path.stem for path in CONFIGS} == set(ALIASES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_a_calibration(path: Path) -> None:
    values = load_config(path, command)
    assert values["model"] == path.stem and resolve(values["model"]).name == path.stem
    with command.make_context("calibrate", ["--config", str(path)]) as context:
        assert values.items() <= context.params.items()
        wished, settings = wishes(context), run_settings(context)
    assert 0 < wished.budget <= 1 and not wished.asks_for_shape
    assert settings.samples == values["samples"] and settings.batch_size == values["batch_size"]
    known = ("float32",) if path.stem.endswith("-tiny") else ("float16", "bfloat16")
    assert settings.dtype in known
    assert values["stats"].name == f"{path.stem}.stats.safetensors"
    assert path.read_text().startswith(f"# yopo calibrate --config configs/{path.name}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_flags_override_it(path: Path) -> None:
    with command.make_context("calibrate", ["--preset", "yopo-12", "--config", str(path)]) as made:
        wished = wishes(made)
    assert (wished.budget, wished.preset) == (None, "yopo-12")
