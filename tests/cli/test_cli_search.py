"""``yopo search``: calibrate with a search unless told otherwise, on a tiny real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import FAST, Yopo

from yopo.cli.options import SEARCH_RUNS
from yopo.planning.search import Search
from yopo.plans.storage import read_plan

ASKED = (*FAST, "--budget", 0.3, "--template", "reader", "--compensation", "none")
"""One candidate plan, so that runs go to the search."""


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Search]:
    """Collects every search that a command makes."""
    made: list[Search] = []

    usual = Search.__init__

    def seen(search: Search, *arguments: Any) -> None:
        usual(search, *arguments)
        made.append(search)

    monkeypatch.setattr(Search, "__init__", seen)
    return made


def test_a_search_measures_plans_and_keeps_the_lower_kl(
    yopo: Yopo, model: Path, pairs: Path, searches: list[Search]
) -> None:
    done = yopo("search", "--model", model, "--data", pairs, *ASKED, "--search", 6, "-o", "p.yaml")
    assert done.code == 0, done.err
    (search,) = searches
    assert search.max_runs == search.runs == 6
    plan = read_plan("p.yaml")
    assert plan.budget.reached <= plan.budget.asked == 0.3
    assert sum(bool(layer.read_heads) for layer in plan.layers)
    first, *others = plan.provenance["candidates"]
    assert others == [each for each in others if each["template"] == "reader"] != []
    assert first["template"] == plan.provenance["template"] == "search from reader"
    assert first["kl"] < others[0]["kl"]


@pytest.mark.parametrize(
    ("command", "said", "expected"),
    [
        ("search", (), [SEARCH_RUNS]),
        ("search", ("--search", 4), [4]),
        ("search", ("--search",), [SEARCH_RUNS]),
        ("calibrate", ("--search", 4), [4]),
        ("calibrate", (), []),
    ],
)
def test_search_is_calibrate_with_a_search_by_default(
    yopo: Yopo,
    model: Path,
    pairs: Path,
    searches: list[Search],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    said: tuple[object, ...],
    expected: list[int],
) -> None:
    monkeypatch.setattr(Search, "run", lambda self, state, found, kl: (found, kl))
    done = yopo(command, *said, "--model", model, "--data", pairs, *ASKED, "-o", "p.yaml")
    assert done.code == 0, done.err
    assert [each.max_runs for each in searches] == expected
    assert read_plan("p.yaml").provenance["template"] == "reader"
