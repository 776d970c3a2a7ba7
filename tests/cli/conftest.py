"""A tiny real LLaVA directory, data, plans, and the command line called in this process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import FAST, Run, Yopo, save_model, side_file

from yopo.cli.main import main
from yopo.demo.pair_files import write_pairs


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory; tests only read it."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in several shards; tests only read it."""
    return save_model(tmp_path_factory.mktemp("models") / "sharded", shard="20KB")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty demo pairs as files: the path of pairs.jsonl; tests only read it."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "demo", "calibration", 40)


@pytest.fixture
def yopo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Yopo:
    """Runs a command line in its own working directory, ``tmp_path / "work"``."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("YOPO_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        return Run(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with plan.yaml, its tensors and stats.safetensors of the model."""
    folder = tmp_path_factory.mktemp("calibrated")
    arguments = ["-q", "calibrate", "--model", model, "--data", "demo:calibration", *FAST]
    outputs = ["-o", folder / "plan.yaml", "--stats", folder / "stats.safetensors"]
    assert main([str(each) for each in (*arguments, *outputs)]) == 0
    return folder


@pytest.fixture
def plan(calibrated: Path, tmp_path: Path) -> Path:
    """A plan file of the model that the test may change, with its tensors next to it."""
    path = shutil.copy(calibrated / "plan.yaml", tmp_path / "plan.yaml")
    shutil.copy(side_file(calibrated / "plan.yaml"), tmp_path)
    return path
