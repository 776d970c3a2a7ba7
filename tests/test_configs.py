"""Every file in configs/ is a calibration that the command line accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from yopo.cli.calibrate import command
from yopo.cli.config import load_config
from yopo.cli.options import plan_request, run_settings
from yopo.models.registry import ALIASES, resolve
from yopo.planning.request import BudgetRequest, PaperRequest

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DTYPES = {True: ("float32",), False: ("float16", "bfloat16")}
"""Of the demo model, and of published checkpoints."""


def test_every_alias_has_a_configuration() -> None:
    assert {path.stem for path in CONFIGS} == set(ALIASES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_a_calibration(path: Path) -> None:
    values = load_config(path, command)
    assert values["model"] == path.stem and resolve(values["model"]).name == path.stem
    with command.make_context("calibrate", ["--config", str(path)]) as context:
        assert values.items() <= context.params.items()
        request, settings = plan_request(context), run_settings(context)
    assert isinstance(request, BudgetRequest) and 0 < request.budget <= 1
    assert settings.samples == values["samples"] and settings.batch_size == values["batch_size"]
    known = ("float32",) if path.stem.endswith("-tiny") else ("float16", "bfloat16")
    assert settings.dtype in known
    assert values["stats"].name == f"{path.stem}.stats.safetensors"
    assert path.read_text().startswith(f"# yopo calibrate --config configs/{path.name}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_flags_override_the_configuration(path: Path) -> None:
    with command.make_context("calibrate", ["--preset", "yopo-12", "--config", str(path)]) as made:
        request = plan_request(made)
    assert isinstance(request, PaperRequest) and request.preset == "yopo-12"
