"""Which plans an engine can run, and the sentence for those that it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Subject

from yopo.cli.main import main
from yopo.plans.schema import PruningPlan
from yopo.plans.servable import engine_problem
from yopo.plans.storage import write_plan


def changed(mha: Subject, **changes: Any) -> PruningPlan:
    """The whole plan with changes in its third layer."""
    plan = tiny.whole(mha)
    layers = list(plan.layers)
    layers[2] = replace(layers[2], **changes)
    return plan.with_layers(layers)


@pytest.mark.parametrize(
    "changes",
    [{}, {"attend_heads": ()}, {"attend_heads": (1, 2)}, {"neurons": 0}]
    + [{"attend_heads": (), "radius": 3}],  # nobody attends: the radius says nothing
)
def test_what_rows_compute_themselves_is_free(mha: Subject, changes: dict[str, Any]) -> None:
    assert engine_problem(changed(mha, **changes)) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"read_heads": (0,), "attend_heads": ()}, "in layer 2 3 of 4 heads may not read"),
        ({"read_heads": (), "attend_heads": ()}, "in layer 2 no head reads"),
        ({"radius": 1}, "in layer 2 visual tokens attend only to neighbors (radius 1)"),
        ({"key_bits": 4}, "in layer 2 visual keys or values are stored in few bits"),
    ],
)
def test_what_kernels_would_have_to_hide(
    mha: Subject, changes: dict[str, Any], problem: str
) -> None:
    found = engine_problem(changed(mha, **changes))
    assert found is not None and problem in found


def test_bidirectional_plans_are_not_servable(mha: Subject) -> None:
    found = engine_problem(replace(tiny.whole(mha), bidirectional=True))
    assert found is not None and "bidirectional" in found


def test_inspect_says_so(
    mha: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_plan(tiny.whole(mha), tmp_path / "yes.yaml")
    write_plan(changed(mha, radius=1), tmp_path / "no.yaml")
    monkeypatch.setenv("COLUMNS", "120")

    def shown(*arguments: str) -> str:
        assert main(["inspect", *arguments]) == 0
        return capsys.readouterr().out

    assert "servable in vLLM  yes" in shown(str(tmp_path / "yes.yaml"))
    problem = "in layer 2 visual tokens attend only to neighbors (radius 1)"
    assert f"servable in vLLM  no, because {problem}" in shown(str(tmp_path / "no.yaml"))
    told = json.loads(shown(str(tmp_path / "no.yaml"), "--json"))
    assert told["servable"] == {"vllm": False, "because": problem}


def test_a_lever_that_the_plugin_does_not_know_is_refused(
    mha: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(tiny.whole(mha), compensation="refit")
    with_map = replace(whole.layers[0], neurons=3, map_rank=2)
    plan = whole.with_layers([with_map, *whole.layers[1:]])
    assert engine_problem(plan) is None
    monkeypatch.setattr("yopo.plans.servable._RUN", ("qkv_rank",))
    assert "map_rank" in str(engine_problem(plan))
