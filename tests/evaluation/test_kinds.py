"""Kinds: the data's where it names some, else by answer length and how questions begin."""

from __future__ import annotations

import random

import pytest

from yopo.data.pairs import Pair
from yopo.evaluation.fidelity import Fidelity, PairFidelity, worst_kind
from yopo.evaluation.kinds import MAX_KINDS, MIN_GROUP, OTHER, kinds_of


def pair(question: str, kind: str | None = None) -> Pair:
    return Pair((), question, (), kind, "0", "here")


def test_the_datas_own_kinds_count() -> None:
    pairs = [pair("a?", "color"), pair("b?", "count"), pair("c?")]
    assert kinds_of(pairs, [1, 2, 3]) == ["color", "count", OTHER]


def test_one_name_for_all_tells_nothing_apart() -> None:
    pairs = [pair("What is it?", "vqa")] * 2 * MIN_GROUP
    lengths = [1] * MIN_GROUP + [40] * MIN_GROUP
    expected = ["1 token, 'what is ...'"] * MIN_GROUP
    expected += ["33 or more tokens, 'what is ...'"] * MIN_GROUP
    assert kinds_of(pairs, lengths) == expected


def test_lengths_and_prefixes_make_groups_of_a_reasonable_size() -> None:
    questions = ["How many cats?"] * 9 + ["how  MANY, dogs?"] * 2 + ["Is there a cat?"] * 8
    questions += [f"{word} shows it?" for word in "abcdefgh"] + ["Describe it."] * 3
    lengths = [1] * 11 + [1] * 8 + [1] * 8 + [30] * 3
    found = kinds_of([pair(each) for each in questions], lengths)
    assert set(found[:11]) == {"1 token, 'how many ...'"}
    assert set(found[11:19]) == {"1 token, 'is there ...'"}
    assert set(found[19:27]) == {"1 token, other"}
    assert set(found[27:]) == {OTHER}


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(0, "1 token"), (1, "1 token"), (2, "2-8 tokens"), (8, "2-8 tokens"), (9, "9-32 tokens")],
)
def test_lengths_alone_where_no_prefix_is_frequent(tokens: int, name: str) -> None:
    pairs = [pair(f"{letter} {letter}") for letter in "abcdefghijkl"]
    assert kinds_of(pairs, [tokens] * 12) == [name] * 12


@pytest.mark.parametrize("has_kinds", [True, False])
def test_kinds_are_never_too_many_and_follow_their_pairs(has_kinds: bool) -> None:
    rng = random.Random(0)
    pairs = [pair(f"w{rng.randrange(90)} x", f"k{rng.randrange(90)}") for _ in range(2000)]
    if not has_kinds:
        pairs = [pair(each.question) for each in pairs]
    lengths = [rng.choice((1, 5, 20, 50)) for _ in pairs]
    found = kinds_of(pairs, lengths)
    assert 1 < len(set(found)) <= MAX_KINDS + 1
    order = rng.sample(range(2000), 2000)
    shuffled = kinds_of([pairs[each] for each in order], [lengths[each] for each in order])
    assert shuffled == [found[each] for each in order]


def fidelity(kl: float, pairs: int, agreed: int = 1) -> Fidelity:
    return Fidelity((PairFidelity(2 * kl, agreed, 2),) * pairs)


def test_the_worst_kind_has_the_largest_kl_of_those_with_enough_pairs() -> None:
    kinds = {"a": fidelity(0.1, MIN_GROUP), "b": fidelity(0.2, MIN_GROUP)}
    kinds |= {"c": fidelity(0.2, MIN_GROUP), "few": fidelity(5.0, MIN_GROUP - 1)}
    assert worst_kind(kinds) == "b"
    assert worst_kind({"a": fidelity(0.1, 1), "few": fidelity(5.0, 1)}) == "few"


def test_parts_add_up_to_the_whole() -> None:
    whole = Fidelity((PairFidelity(0.5, 2, 2), PairFidelity(1.5, 1, 3), PairFidelity(0.0, 1, 1)))
    assert (whole.kl, whole.agreement, whole.tokens) == (2 / 6, 4 / 6, 6)
    assert whole.whole_answers == 2
    parts = whole.split(["x", "y", "x"])
    assert list(parts) == ["x", "y"] and parts["y"] == fidelity_of(1.5, 1, 3)
    assert parts["x"].whole_answers == 2 and parts["x"].tokens == 3


def fidelity_of(kl: float, agreed: int, tokens: int) -> Fidelity:
    return Fidelity((PairFidelity(kl, agreed, tokens),))
