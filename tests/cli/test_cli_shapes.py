"""`yopo plan --shape-of`: plans of a published shape, to be timed and not to be applied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Yopo

from yopo.bench.plans import FITTED, PRESETS
from yopo.plans.flops import visual_budget
from yopo.plans.storage import read_plan


@pytest.mark.parametrize("preset", ["yopo-25", "reader-12"])
def test_a_plan_of_a_shape_is_what_bench_times(yopo: Yopo, preset: str) -> None:
    done = yopo("plan", "--preset", preset, "--shape-of", "llava-1.5-7b")
    assert done.code == 0 and "bench plan.yaml --random-weights" in done.err, done.err
    plan = read_plan("plan.yaml")
    assert plan.provenance == {"preset": preset, "scores": "made up"}
    assert plan.model.shape.hidden == 4096
    assert visual_budget(plan) == pytest.approx(0.25 if preset == "yopo-25" else 0.12, abs=0.01)


def test_it_is_refused_where_it_would_prune_at_random(yopo: Yopo, model: Path) -> None:
    assert yopo("plan", "--preset", "yopo-12", "--shape-of", "llava-1.5-13b").code == 0
    for command in (("apply", "plan.yaml"), ("eval", "plan.yaml"), ("bench", "plan.yaml")):
        for of in ((), ("--model", model)):
            done = yopo(*command, *of)
            assert done.is_sentence and "not chosen by measurement" in done.err, done
    done = yopo("inspect", "plan.yaml", "--json")
    assert done.code == 0 and json.loads(done.out)


def test_other_requests_are_refused(yopo: Yopo) -> None:
    for more in ((), ("--budget", 0.5), ("--preset", "yopo-25", "--radius", 3)):
        done = yopo("plan", "--shape-of", "llava-1.5-7b", *more)
        assert done.code == 2 and "needs --preset" in done.err, done
    assert yopo("plan").code == 2
    done = yopo("plan", "--preset", "yopo-25", "--shape-of", "llava-1.5-8b")
    assert done.is_sentence and "Did you mean" in done.err
    done = yopo("plan", "--preset", "yopo-26", "--shape-of", "llava-1.5-7b")
    assert done.is_sentence and "Did you mean" in done.err
    assert FITTED not in PRESETS and not list(Path().iterdir())
