"""What a command needs is said before it starts, checked, and near to what it takes."""

from __future__ import annotations

import itertools
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from yopo.fitting import fitter
from yopo.pipeline import judge, model_handle
from yopo.pipeline.commands import calibrate, evaluate
from yopo.pipeline.needs import check
from yopo.pipeline.needs.duration import Speed, seconds
from yopo.pipeline.needs.job import Counts, Job, PlanCounts, Prompts, plans_for
from yopo.pipeline.needs.memory import certain_states, finished, stages, states_in_files
from yopo.pipeline.needs.probe import PROBED, prompts_of, speed_on
from yopo.pipeline.needs.sentences import in_bytes, in_time, listed
from yopo.pipeline.opening import open_for
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.request import BudgetRequest, PaperRequest, PlanRequest, ToleranceRequest
from yopo.plans.schema import ModelShape
from yopo.serving.weight_sizes import WeightSizes
from yopo.support import memory
from yopo.support.console import set_quiet
from yopo.support.errors import YopoError

SEVEN_B = ModelShape(32, 4096, 32, 32, 128, 11008)
LAYER = 4 * 4096**2 + 3 * 4096 * 11008
WEIGHTS = WeightSizes(
    32 * LAYER + 600_000_000,
    LAYER,
    32 * LAYER,
    300_000_000,
    12_000_000,
    280_000_000,
    torch.bfloat16,
)
PROMPTS = Prompts(640, 620.0, 576.0, 576.0, 0.02)
JOB = Job(
    shape=SEVEN_B,
    vocabulary=32_064,
    weights=WEIGHTS,
    prompts=PROMPTS,
    counts=Counts(192, 192, 64),
    plans=PlanCounts(18, 18, budget=0.12, profiles=True),
    batch_size=8,
    new_tokens=32,
    on_host=False,
)
SPEED = Speed(3e14, 2e13, 1e12, 1e-12, 2e-3)
COMPARING = "comparing plans with the dense model"
OPTIONS = RunOptions(samples=32, max_new_tokens=2)


def on_device(job: Job, name: str) -> float:
    return next(each.device for each in stages(job) if each.name == name)


def test_states_of_all_pairs_wait_on_the_device_during_a_fit() -> None:
    """A test of sizes: 192 pairs of a 7B model have states of a gigabyte, many times over."""
    once = 192 * 620 * 4096 * 2
    fewer = replace(JOB, counts=replace(JOB.counts, fit=96))
    fit = on_device(JOB, "the fit")
    assert 8 * once < fit < 24 * once
    assert fit - on_device(fewer, "the fit") > 4 * once
    assert on_device(fewer, "measuring statistics") == on_device(JOB, "measuring statistics")
    assert certain_states(JOB) == once


def test_layers_on_disk_move_states_to_the_host_or_to_files() -> None:
    host = replace(JOB, is_offloaded=True, window=1 << 30)
    files = replace(host, has_folder=True)
    fits = [{each.name: each for each in stages(job)}["the fit"] for job in (JOB, host, files)]
    assert fits[1].device < fits[0].device / 2 and fits[2].device == fits[1].device
    assert fits[1].host > 1e9 + fits[0].host and fits[2].host < fits[1].host / 2
    assert states_in_files(files) > 8e9 and states_in_files(host) == states_in_files(JOB) == 0
    assert certain_states(host) == certain_states(files) == 0 < finished(files)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("measuring statistics", {"batch_size": 16}),
        (COMPARING, {"new_tokens": 256}),
        (COMPARING, {"vocabulary": 1_000_000}),
        ("the fit", {"processes": 2, "counts": Counts(192, 384, 64)}),
        ("the fit", {"plans": replace(JOB.plans, budget=0.3)}),
    ],
)
def test_what_makes_a_stage_larger(name: str, change: dict[str, Any]) -> None:
    assert on_device(replace(JOB, **change), name) > on_device(JOB, name)


def test_time_follows_the_work() -> None:
    whole = seconds(JOB, SPEED)
    assert 60 < whole < 3600
    assert seconds(replace(JOB, plans=PlanCounts()), SPEED) < whole / 2
    assert whole / 2 < seconds(replace(JOB, processes=2), SPEED) < whole
    assert seconds(JOB, replace(SPEED, products=1e13)) > 1.5 * whole


@pytest.mark.parametrize(
    "request_",
    [
        BudgetRequest(0.2, compensation="refit"),
        BudgetRequest(0.2, template="reader", compensation="refit"),
        BudgetRequest(0.2, compensation="mean"),
        PaperRequest(preset="yopo-25", compensation="refit"),
    ],
    ids=str,
)
def test_plans_are_counted(request_: PlanRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counting(name: str, usual: Callable[..., Any], many: bool = False) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            calls["fitted"] += len(args[2]) if many else 0
            return usual(*args, **kwargs)

        return count

    monkeypatch.setattr(fitter, "refit", counting("walks", fitter.refit, many=True))
    monkeypatch.setattr(judge, "compare", counting("compared", judge.compare))
    said: list[PlanCounts] = []

    def noting(*args: Any) -> PlanCounts:
        said.append(plans_for(*args))
        return said[-1]

    monkeypatch.setattr(check, "plans_for", noting)
    calibrate("llava-tiny", request_, options=OPTIONS)
    [plans] = said
    found = {"walks": plans.walks, "fitted": plans.fitted}
    found["compared"] = plans.compared
    for name, most in found.items():
        assert most / 2 <= calls[name] <= most, (name, calls[name], most)


def test_a_tolerance_tries_budgets() -> None:
    found, once = (
        plans_for((each,), Counts(24, 24, 8, 8))
        for each in (ToleranceRequest(0.1), BudgetRequest(0.2, compensation="refit"))
    )
    assert found.walks == once.walks + 5 and found.fitted == once.fitted + 20


def test_prompts_are_probed_from_small_to_large() -> None:
    handle = model_handle.ModelHandle("internvl-tiny", None, RunOptions())
    pairs = open_for(handle, RunOptions(samples=64), "internvl-tiny", "calibration")
    found = prompts_of(pairs, handle.processor, handle.config)
    assert found is not None and found.longest >= found.mean > found.visual > 0
    assert found.patches == 4 * found.visual, "InternVL merges 2 x 2 patches"
    half = prompts_of(pairs, handle.processor, handle.config, 0.5)
    assert half is not None and half.patches == found.patches
    assert half.visual == found.visual / 2 and half.mean == found.mean - half.visual
    some = prompts_of(list(pairs)[: PROBED // 2], handle.processor, handle.config)
    assert some is not None and some.longest <= found.longest


def calibrated(**more: Any) -> None:
    request = BudgetRequest(0.2, template="reader", compensation="refit")
    calibrate("llava-tiny", request, options=replace(OPTIONS, **more))


def free(monkeypatch: pytest.MonkeyPatch, count: int | None, in_groups: int | None = None) -> None:
    monkeypatch.setattr(memory, "_of_system", lambda: count)
    monkeypatch.setattr(memory, "free_in_groups", lambda: in_groups)


def test_a_clock_may_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a virtual machine's thread does so during calls that its host interrupts."""
    reads = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: next(reads) // 3 * 1e-6)
    shape = replace(SEVEN_B, hidden=16, ffn=32)
    speed = speed_on(torch.device("cpu"), torch.float32, shape, 4, 2)
    assert speed.moments == pytest.approx(2 * 16**3 / 1e-6, rel=1e-3)


def test_an_estimate_is_printed_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    free(monkeypatch, 8_000_000_000)
    seen: list[str] = []
    usual = model_handle.load_dense

    def load(*args: Any, **kwargs: Any) -> Any:
        seen.append(capsys.readouterr().err)
        return usual(*args, **kwargs)

    monkeypatch.setattr(model_handle, "load_dense", load)
    calibrated()
    [said] = seen
    assert "This takes about 1" in said and " MB of memory (8 GB are free) and " in said
    assert "warning" not in said
    set_quiet(True)
    try:
        calibrated()
    finally:
        set_quiet(False)
    assert "takes about" not in seen[-1]


def test_an_evaluation_says_it_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    request = BudgetRequest(0.2, template="reader", compensation="none")
    plan = calibrate("llava-tiny", request, options=OPTIONS).plan
    capsys.readouterr()
    free(monkeypatch, 60_000_000)
    evaluate(plan, options=OPTIONS, timing_runs=0)
    said = capsys.readouterr().err
    assert "This takes about 1" in said
    assert "Use --offload always, fewer --samples, fewer --max-new-tokens, a smaller" in said


def test_scarce_memory_causes_a_warning_that_names_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    free(monkeypatch, 60_000_000)
    calibrated()
    said = capsys.readouterr().err
    assert "warning: 60 MB of memory are free, and the fit may take 1" in said
    options = "--offload always, fewer --fit-pairs, a smaller --batch-size, or --dtype bfloat16."
    assert f"Use {options}" in said
    calibrated(offload="always", batch_size=1)
    said = capsys.readouterr().err
    assert "Use --work-dir, fewer --fit-pairs, or --dtype bfloat16." in said


def test_the_limit_of_a_container_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    free(monkeypatch, 8_000_000_000, 60_000_000)
    calibrated()
    said = capsys.readouterr().err
    assert " of memory (60 MB are free under its cgroup's limit) and " in said
    assert "warning: 60 MB of memory are free under its cgroup's limit, and the fit may" in said
    free(monkeypatch, 8_000_000_000, 500_000)
    with pytest.raises(YopoError, match="and 1 MB are free under its cgroup's limit") as caught:
        calibrated()
    assert "--offload always" in str(caught.value.remedy)


def test_memory_that_is_surely_needed_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_handle, "load_dense", lambda *_, **__: pytest.fail("loaded"))
    free(monkeypatch, 500_000)
    with pytest.raises(YopoError, match="states of 24 pairs take .* and 1 MB are free") as caught:
        calibrated()
    assert "--offload always" in str(caught.value.remedy)
    with pytest.raises(YopoError, match="18.8 MB of weights do not fit|weights do not fit"):
        calibrated(dtype="float64")  # is not mapped from the files


def test_nothing_is_refused_where_the_system_does_not_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    free(monkeypatch, None)
    calibrated()
    said = capsys.readouterr().err
    assert " MB of memory and " in said and "warning: 6" not in said


def test_a_disk_that_is_too_small_for_states_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    request = BudgetRequest(0.2, template="reader", compensation="refit")
    fit = FitOptions(work_dir=tmp_path / "work")
    with pytest.raises(
        YopoError, match=r"states of 24 pairs take .* in .*, and 1 MB are free"
    ) as caught:
        options = replace(OPTIONS, offload="always")
        calibrate("llava-tiny", request, options=options, fit_options=fit)
    assert "--work-dir on another disk" in str(caught.value.remedy)
    assert not (tmp_path / "work").exists()


def test_a_work_directory_is_part_of_it(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    request = BudgetRequest(0.2, template="reader", compensation="refit")
    for _ in range(2):
        calibrate("llava-tiny", request, options=OPTIONS, fit_options=FitOptions(work_dir=tmp_path))
    first, second = (
        line for line in capsys.readouterr().err.splitlines() if line.startswith("This takes")
    )
    assert f" in {tmp_path} (" in first and "finished stages" not in first
    assert second.endswith(f"; less, as far as {tmp_path} holds finished stages.")


def test_processes_share_the_memory_of_their_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    free(monkeypatch, 8_000_000_000)
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    handle = model_handle.ModelHandle("llava-tiny", None, OPTIONS)
    pairs = open_for(handle, OPTIONS, "llava-tiny", "calibration")
    plan_counts = plans_for((BudgetRequest(0.2),), Counts(24, 24, 8))
    job = check._job(handle, pairs, OPTIONS, Counts(24, 24, 8), plan_counts)
    assert job is not None and job.processes == 4 and job.own(24) == 8
    check._check(handle, job, None, None)
    said = capsys.readouterr().err
    assert "Each of 4 processes takes about" in said and "memory (4 GB are free)" in said


def test_numbers_are_said_in_two_digits() -> None:
    assert [in_bytes(each) for each in (10, 3.44e8, 9.6e8, 3.44e9, 2.13e10)] == [
        "1 MB",
        "340 MB",
        "0.96 GB",
        "3.4 GB",
        "21 GB",
    ]
    assert [in_time(each) for each in (0.1, 42, 722, 12_700)] == ["1 s", "42 s", "12 min", "3.5 h"]
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"
