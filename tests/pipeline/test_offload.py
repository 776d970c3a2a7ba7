"""Layers stay on disk where they are to, or where weights do not fit; plans are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from yopo.cli.group import cli
from yopo.models.offloaded import is_offloaded
from yopo.pipeline.commands import calibrate
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.request import BudgetRequest
from yopo.plans.storage import write_plan
from yopo.serving import layers_on_disk


@pytest.mark.parametrize(
    ("offload", "free", "expected"),
    [
        ("never", 1 << 40, False),
        ("auto", 1 << 40, False),
        ("auto", 6 << 20, True),
        ("always", 1 << 40, True),
    ],
)
def test_where_layers_are(
    offload: str, free: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_on_disk, "free_memory", lambda device: free)
    handle = ModelHandle("llava-tiny", None, RunOptions(offload=offload))  # type: ignore[arg-type]
    decoder = handle.model.get_decoder()
    assert is_offloaded(decoder) == expected
    assert all(each.is_meta == expected for each in decoder.layers.parameters())


def test_calibration_is_the_same(tmp_path: Path) -> None:
    request = BudgetRequest(0.12, template="reader", compensation="refit")
    made = []
    for offload in ("never", "always"):
        options = RunOptions(samples=32, max_new_tokens=3, offload=offload)  # type: ignore[arg-type]
        fit = FitOptions(work_dir=tmp_path / offload)
        made.append(calibrate("llava-tiny", request, options=options, fit_options=fit).plan)
    assert made[0].tensors.refit
    one, other = (tmp_path / str(number) / "plan.yaml" for number in range(2))
    for plan, path in zip(made, (one, other), strict=True):
        path.parent.mkdir()
        write_plan(plan, path)
    for path in one.parent.iterdir():
        assert path.read_bytes() == (other.parent / path.name).read_bytes()


def test_a_device_map_says_it_already() -> None:
    given = ["calibrate", "--model", "llava-tiny", "--offload", "always", "--device-map", "auto"]
    found = CliRunner().invoke(cli, given)
    assert found.exit_code == 2
    assert "exclude one another" in found.output
