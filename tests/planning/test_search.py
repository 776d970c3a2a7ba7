"""In the layer-by-layer search every state keeps the budget and only measured gains count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import statistics_maker

from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest
from yopo.planning.search import MARGIN, Measure, Search, moves, resolve, state_of
from yopo.planning.templates import Layers, TemplateBuilder
from yopo.plans.schema import PruningPlan
from yopo.support.errors import PlanError

BUDGET = 0.3


@pytest.fixture(scope="module", params=[8, 2], ids=["mha", "gqa"])
def builder(request: pytest.FixtureRequest) -> TemplateBuilder:
    return TemplateBuilder(statistics_maker.make(kv_heads=request.param), BUDGET)


def wants_attention_in_layer_3(layers: Layers, compensation: str) -> float:
    """A made-up KL whose best plan attends only in layer 3 and is not compensated."""
    wrong = sum(bool(layer.attend_heads) is not (index == 3) for index, layer in enumerate(layers))
    return 1.0 + wrong + (compensation == "mean") / 2


def make_search(builder: TemplateBuilder, measure: Measure, max_runs: int) -> Search:
    return Search(
        lambda state: moves(state, builder),
        lambda state: resolve(state, builder),
        measure,
        max_runs,
    )


def test_every_move_resolves_to_a_plan_within_the_budget(builder: TemplateBuilder) -> None:
    start = state_of(builder.build("reader"), "none")
    found = dict(moves(start, builder))
    assert len(found) > 3 * builder.shape.layers
    resolved = [resolve(state, builder) for state in found.values()]
    kept = [each[0] for each in resolved if each is not None]
    assert len(kept) > builder.shape.layers
    assert max(builder.cost(layers) for layers in kept) <= BUDGET
    assert len(set(kept)) > builder.shape.layers


def test_the_search_finds_the_best_plan_by_the_measure(builder: TemplateBuilder) -> None:
    start = builder.build("reader")
    first = wants_attention_in_layer_3(start, "mean")
    search = make_search(builder, wants_attention_in_layer_3, 500)
    (layers, compensation), kl = search.run(state_of(start, "mean"), (start, "mean"), first)
    assert kl == wants_attention_in_layer_3(layers, compensation) == 1.0 < first
    assert [index for index, layer in enumerate(layers) if layer.attend_heads] == [3]
    assert compensation == "none" and builder.cost(layers) <= BUDGET


def test_without_a_better_plan_the_given_one_remains(builder: TemplateBuilder) -> None:
    start = builder.build("withdraw")
    search = make_search(builder, lambda layers, compensation: 5.0, 40)
    assert search.run(state_of(start, "none"), (start, "none"), 1.0) == ((start, "none"), 1.0)


def test_runs_are_limited_and_no_plan_is_measured_twice(builder: TemplateBuilder) -> None:
    seen = []

    def measure(layers: Layers, compensation: str) -> float:
        seen.append((layers, compensation))
        return wants_attention_in_layer_3(layers, compensation)

    search = make_search(builder, measure, 25)
    start = builder.build("reader")
    search.run(state_of(start, "mean"), (start, "mean"), 99.0)
    assert len(seen) == len(set(seen)) == search.runs <= 25


def add_one_of(letters: str, kl: dict[str, float], max_runs: int = 100) -> tuple[str, float]:
    """A search over sets of letters, from the empty one, whose moves add a letter each.

    Args:
        letters: The moves.
        kl: Of every set, by its letters in order.
        max_runs: Of the search.
    """

    def moves(state: str) -> Iterator[tuple[str, str]]:
        return ((each, "".join(sorted(state + each))) for each in letters if each not in state)

    search = Search(moves, lambda state: (state, "none"), lambda state, _: kl[state], max_runs)
    (found, _), reached = search.run("", ("", "none"), kl[""])
    return found, reached


def test_a_gain_within_the_margin_is_noise() -> None:
    for gain, expected in ((0.9 * MARGIN, ""), (1.1 * MARGIN, "a")):
        kl = {"": 1.0, "a": 1.0 - gain}
        assert add_one_of("a", kl) == (expected, kl[expected])


def test_a_move_is_stacked_only_if_it_gains_more_than_the_margin_again() -> None:
    kl = {"": 1.0, "a": 0.9, "b": 0.91}
    for gain, expected in ((0.9 * MARGIN, "a"), (1.1 * MARGIN, "ab")):
        kl["ab"] = kl["a"] * (1 - gain)
        assert add_one_of("ab", kl) == (expected, kl[expected])


def test_a_move_that_gains_little_waits_for_the_next_sweep() -> None:
    """There it competes with all others and need not be the first."""
    kl = {"": 1.0, "a": 0.9, "b": 0.998, "c": 0.999, "ab": 0.7, "ac": 0.5, "bc": 0.9, "abc": 0.8}
    assert add_one_of("abc", kl) == ("ac", 0.5)


def test_a_searched_plan_says_where_it_comes_from() -> None:
    statistics = statistics_maker.make()

    def measure(plan: PruningPlan) -> float:
        return wants_attention_in_layer_3(plan.layers, plan.compensation)

    plan, candidates = make_plan(statistics, BudgetRequest(BUDGET, search=300), measure)
    assert plan.provenance["template"].startswith("search from ")
    assert candidates[0].kl < candidates[1].kl
    assert plan.budget.reached <= BUDGET


def test_a_search_without_a_model_is_refused() -> None:
    with pytest.raises(PlanError, match="which is not available here"):
        make_plan(statistics_maker.make(), BudgetRequest(BUDGET, search=10))
