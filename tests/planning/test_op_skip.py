"""The template ``op-skip``: whole operators, every layer read, the policy chosen by measured KL."""

from __future__ import annotations

import pytest
import statistics_maker

from yopo.planning.op_skip import ATTENTION, FFN, Policy, swaps
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest
from yopo.planning.templates import TemplateBuilder
from yopo.plans.schema import PruningPlan

BUDGETS = (0.2, 0.3, 0.45, 0.7, 1.0)


def operators(plan: PruningPlan) -> set[tuple[int, str]]:
    """The operators that visual tokens run, none of them in part; every layer is read whole."""
    shape, found = plan.model.shape, set()
    everything = tuple(range(shape.heads))
    for number, layer in enumerate(plan.layers):
        assert layer.read_heads == everything and layer.radius is None and not layer.is_fitted
        assert layer.attend_heads in ((), everything) and layer.neurons in (0, shape.ffn)
        found |= {(number, ATTENTION)} if layer.attend_heads else set()
        found |= {(number, FFN)} if layer.neurons else set()
    return found


def made(budget: float, kv_heads: int = 8) -> PruningPlan:
    statistics = statistics_maker.make(kv_heads=kv_heads)
    request = BudgetRequest(budget, template="op-skip", compensation="none")
    return make_plan(statistics, request)[0]


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("budget", BUDGETS)
def test_it_runs_whole_operators_as_long_as_they_fit(budget: float, kv_heads: int) -> None:
    builder = TemplateBuilder(statistics_maker.make(kv_heads=kv_heads), budget)
    plan = made(budget, kv_heads)
    found = operators(plan)
    assert plan.budget.reached <= budget
    last = plan.model.shape.layers - 1
    assert not {(last, ATTENTION), (last, FFN)} & found
    for operator in set(Policy.early(last + 1, "none").order) - found:
        more = Policy((*sorted(found), operator), "none").layers(builder)
        assert more == plan.layers  # it would exceed the budget
    assert found or budget < 0.3
    assert budget < 1 or len(found) == 2 * last


def test_it_needs_the_keys_and_values_of_all_layers() -> None:
    for kv_heads in (8, 2):
        statistics = statistics_maker.make(kv_heads=kv_heads)
        builder = TemplateBuilder(statistics, 0.9)
        least = builder.cost((builder.reader_layer,) * statistics.model.shape.layers)
        for budget, fits in ((least * 0.99, False), (least * 1.01, True)):
            layers = TemplateBuilder(statistics, budget).candidate("op-skip")
            assert (layers is not None) is fits


def test_the_first_layers_come_first() -> None:
    found = operators(made(0.5))
    depth = max(number for number, _ in found)
    assert {(number, kind) for number in range(depth) for kind in (ATTENTION, FFN)} <= found


def test_a_search_finds_the_operators_that_matter() -> None:
    wanted = {(5, FFN), (6, ATTENTION)}
    runs = []

    def kl(plan: PruningPlan) -> float:
        runs.append(operators(plan))  # every plan measured is of the shape
        return 1.0 + len(wanted - runs[-1])

    statistics = statistics_maker.make()
    request = BudgetRequest(0.35, template="op-skip", compensation="none", search=80)
    plan, found = make_plan(statistics, request, kl)
    assert runs[0] & wanted != wanted
    assert wanted <= operators(plan) and plan.budget.reached <= 0.35
    assert found[0].template == "search from op-skip" and found[0].kl == 1.0
    assert len(runs) <= 81


def test_a_swap_moves_one_operator() -> None:
    policy = Policy.early(3, "none")
    for name, swapped in swaps(policy):
        if name.startswith("compensation"):
            assert (swapped.order, swapped.compensation) == (policy.order, "mean")
            continue
        moved = swapped.order[0 if name.endswith("first") else -1]
        assert sorted(swapped.order) == sorted(policy.order)
        kept = [[each for each in one.order if each != moved] for one in (policy, swapped)]
        assert kept[0] == kept[1]
