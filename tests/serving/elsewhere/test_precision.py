"""--dtype auto on a CPU: float16 checkpoints are loaded in what is fast there, and it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from yopo.checkpoint.reader import Checkpoint
from yopo.serving import precision
from yopo.serving.precision import dtype_for


def saved(path: Path, dtype: torch.dtype) -> Checkpoint:
    tiny.llava("mha").to(dtype).save_pretrained(path)
    return Checkpoint.open(path)


@pytest.mark.parametrize("fast", [False, True])
def test_float16_becomes_what_the_processor_multiplies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fast: bool,
) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: fast)
    checkpoint = saved(tmp_path, torch.float16)
    capsys.readouterr()
    expected = torch.bfloat16 if fast else torch.float32
    assert dtype_for("auto", checkpoint, "cpu") == expected
    said = capsys.readouterr().err
    assert str(expected).removeprefix("torch.") in said and len(said.splitlines()) == 1
    checkpoint.config.dtype = None  # then the weights decide
    assert dtype_for("auto", checkpoint, "cpu") == expected
    capsys.readouterr()
    assert dtype_for(torch.float16, checkpoint, "cpu") == torch.float16
    assert dtype_for("auto", checkpoint, "cuda") == "auto"
    assert not capsys.readouterr().err


def test_it_stays_if_float32_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
    checkpoint = saved(tmp_path, torch.float16)
    monkeypatch.setattr(precision, "available_bytes", lambda: 2 * checkpoint.num_bytes)
    assert dtype_for("auto", checkpoint, "cpu") == "auto"
    assert "float32 needs" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_others_stay(
    tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved(tmp_path, dtype)
    capsys.readouterr()
    assert dtype_for("auto", checkpoint, "cpu") == "auto"
    assert not capsys.readouterr().err
