"""What a budget has left goes to the changes that prevent most damage per FLOP."""

from __future__ import annotations

from yopo.planning.choices import Choice, Choices, spend_rest
from yopo.planning.paper import EMPTY


def choice(flops: int, damage: float) -> Choice:
    return Choice(EMPTY, flops, damage)


def always(choices: Choices) -> bool:
    return True


def test_the_best_change_per_flop_comes_first() -> None:
    chosen = (choice(0, 1.0), choice(10, 1.0))
    options = [[choice(4, 0.5)], [choice(12, 0.4)]]
    assert spend_rest(chosen, options, 5, always) == (chosen[0], options[1][0])
    assert spend_rest(chosen, options, 6, always) == (options[0][0], options[1][0])
    assert spend_rest(chosen, options, 1, always) == chosen


def test_a_part_is_improved_more_than_once() -> None:
    steps = [choice(1, 0.5), choice(3, 0.2), choice(9, 0.1)]
    assert spend_rest((choice(0, 1.0),), [steps], 8, always) == (steps[1],)
    assert spend_rest((choice(0, 1.0),), [steps], 9, always) == (steps[2],)


def test_nothing_that_does_as_much_damage_or_is_cheaper_is_chosen() -> None:
    chosen, options = (choice(5, 1.0),), [choice(6, 1.0), choice(6, 2.0), choice(4, 0.0)]
    assert spend_rest(chosen, [options], 9, always) == chosen


def test_other_limits_are_kept() -> None:
    start, good, fair = choice(0, 1.0), choice(1, 0.1), choice(1, 0.2)
    chosen = spend_rest((start,), [[good, fair]], 9, lambda choices: choices != (good,))
    assert chosen == (fair,)
