"""``torchrun -m yopo calibrate`` on real GPUs: NCCL for tensors, gloo for all else.

Skipped without CUDA. One GPU suffices, except where two are asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from yopo.calibration.statistics_file import load_statistics
from yopo.plans.storage import read_plan

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

LINE = (
    *("calibrate", "--model", "llava-tiny", "--samples", 32, "--batch-size", 4, "-q"),
    *("--measure-pairs", 8, "--fit-pairs", 8, "--max-new-tokens", 2),
    *("--budget", 0.3, "--template", "reader", "--compensation", "refit"),
)


def torchrun(folder: Path, processes: int, *options: object) -> subprocess.CompletedProcess[str]:
    """Calibrate in a folder, on the first of the GPUs for each process."""
    folder.mkdir(exist_ok=True)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    outputs = ("-o", "plan.yaml", "--stats", "stats.safetensors", "--work-dir", "work", "--force")
    line = [sys.executable, *launch, "-m", "yopo", *LINE, *outputs, *options]
    return subprocess.run(
        [str(each) for each in line],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def outputs(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}


@pytest.mark.parametrize("offload", ["never", "always"])
def test_one_process_calibrates_on_the_gpu(tmp_path: Path, offload: str) -> None:
    """Sums over batches go through NCCL also where there is one process."""
    for device in ("cuda", "cpu"):
        done = torchrun(tmp_path / device, 1, "--device", device, "--offload", offload)
        assert done.returncode == 0, done.stderr
    there, here = (read_plan(tmp_path / device / "plan.yaml") for device in ("cuda", "cpu"))
    assert there.tensors.refit.keys() == here.tensors.refit.keys() and here.tensors.refit
    one, other = (
        load_statistics(tmp_path / device / "stats.safetensors") for device in ("cuda", "cpu")
    )
    assert torch.allclose(one.rho.mean(dim=0), other.rho.mean(dim=0), rtol=0.05, atol=1e-3)
    assert not torch.equal(one.rho, other.rho), "both computed on the CPU"
    first = outputs(tmp_path / "cuda")
    done = torchrun(tmp_path / "cuda", 1, "--offload", offload)  # all is kept
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "cuda") == first


def test_two_processes_on_one_gpu_are_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = torchrun(tmp_path, 2)
    assert done.returncode == 1
    assert "error: 2 processes on this machine, but it has 1 GPU: each needs its own.\n" in (
        done.stderr
    )
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Use torchrun --nproc-per-node 1, or --device cpu." in done.stderr
    assert not outputs(tmp_path)


def test_two_processes_calibrate_on_the_cpu_of_a_machine_with_a_gpu(tmp_path: Path) -> None:
    for processes in (1, 2):
        done = torchrun(tmp_path / str(processes), processes, "--device", "cpu")
        assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "1") == outputs(tmp_path / "2") != {}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_write_what_one_does(tmp_path: Path) -> None:
    for processes in (1, 2):
        done = torchrun(tmp_path / str(processes), processes)
        assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "1") == outputs(tmp_path / "2") != {}
