"""The study of reductions: jobs measure and write, a pool survives failures and ends in time."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import reduction
import reduction_study as study
import reduction_times
import tiny
import torch
from reduction import Job

FEW = {"samples": 24, "pairs": 12, "max_new_tokens": 6, "plan": None}


def measured(folder: Path, job: Job) -> list[dict[str, Any]]:
    options = Namespace(**FEW, results=folder, output=folder / f"{job.name}.json")
    reduction.run(job, options)
    return json.loads(options.output.read_text())["rows"]


def test_a_composition_is_compared_at_equal_flops_and_kv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.try_few_plans(monkeypatch)
    threads = torch.get_num_threads()
    where = ("llava-tiny", 0)
    found = []
    for method in ("folder", "random"):
        job = Job("composed", *where, method, 0.5, (0.12,))
        (row,) = measured(tmp_path, job)
        found.append(row)
        assert (row["tokens"], row["of"], row["pairs"]) == (32, 64, 12)
        assert 0.1 < row["flops"] <= 0.12 and row["kv"] <= 0.5
    (row,) = measured(tmp_path, Job("matched", *where, None, 0.5, (0.12,)))
    torch.set_num_threads(threads)
    assert row["best"] == "folder"  # random tokens are no candidate
    assert row["tokens"] == 64 and row["kv"] <= row["kv_budget"] == found[0]["kv"]
    study.collect(tmp_path)
    shown = capsys.readouterr().out
    assert "| folder 50 %, plan | 32 of 64 |" in shown
    assert "all tokens, plan with as few KV bytes as that to 50 % (folder)" in shown


def test_what_a_family_refuses_is_a_row_with_the_reason(tmp_path: Path) -> None:
    few = [("scope", 0.5, {}), ("grid", 0.5, {})]
    options = Namespace(**FEW | {"pairs": 6}, results=tmp_path)
    measuring = reduction.Measuring(Job("alone", "qwen2-vl-tiny", 0), options)
    rows = list(reduction._before(measuring, measuring.whole(), few))
    assert rows[0]["whole"] == 1.0 and rows[0]["flops"] == 1.0
    assert "needs the attention of a class token" in rows[1]["missing"]
    assert rows[2]["tokens"] < rows[2]["of"]
    assert study.runs_on("scope", "llava-tiny") and not study.runs_on("scope", "qwen2-vl-tiny")


def test_jobs_come_in_order_of_importance_and_after_what_they_need() -> None:
    every = study.jobs(study.MODELS, study.SEEDS)
    assert len({job.name for job in every}) == len(every)
    assert [job.part for job in every[:9]] == ["alone"] * 9
    for number, job in enumerate(every):
        assert set(study.needs(job, every)) <= set(every[:number])
    matched = Job("matched", "llava-tiny", 0, share=0.5)
    assert {job.method for job in study.needs(matched, every)} == set(study.COMPOSED)


def test_the_pool_survives_failures_and_keeps_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(job: Job, options: Namespace, *, show: bool) -> None:
        if job.model == "bad":
            raise RuntimeError("no such model")
        time.sleep(60 if job.model == "slow" else 0)
        options.output.write_text(json.dumps({"rows": [{"part": job.part, "model": job.model}]}))

    monkeypatch.setattr(reduction, "run", work)
    monkeypatch.setattr(study, "SECONDS", {"alone": 0.5, "composed": 0.5, "matched": 0.5})
    jobs = [Job("alone", model, 0) for model in ("bad", "good", "slow")]
    jobs += [Job("composed", "slow", 0, "par", 0.5), Job("matched", "slow", 0, share=0.5)]
    started = time.monotonic()
    study.Pool(tmp_path, Namespace(workers=2, deadline=3.0), jobs).run()
    assert time.monotonic() - started < 8
    said = capsys.readouterr().out
    assert "alone_bad_seed0: FAILED" in said and "alone_good_seed0: done" in said
    assert "alone_slow_seed0: stopped at the deadline" in said
    assert "matched_slow_seed0_0.5: not started" in said
    assert [row["model"] for row in reduction.read_rows(tmp_path)] == ["good"]
    assert "no such model" in (tmp_path / "alone_bad_seed0.log").read_text()


def test_times_are_of_every_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--width", "128", "--layers", "1", "--tokens", "36", "--shares", "0.5"]
    monkeypatch.setattr("sys.argv", ["reduction_times.py", *quick, "--rounds", "1"])
    reduction_times.main()
    shown = capsys.readouterr().out
    assert "36 visual tokens of width 128, 18 kept" in shown
    assert all(f"| {name} | " in shown for name in reduction_times.METHODS)
