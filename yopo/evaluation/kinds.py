"""Kinds of pairs, so that a report names the worst one: a mean hides what only a few pairs lose.

The data's own kinds count where it tells pairs apart. Otherwise pairs are grouped by what needs no
label: how long the dense model's answer is, and how the question begins. The same pairs and answers
give the same kinds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from yopo.data.pairs import Pair

OTHER = "other"
"""What is left of groups that are too small to say anything."""

MIN_GROUP = 8
"""Pairs of a kind that is made here: with fewer, one pair decides which kind is the worst."""

MAX_KINDS = 32
"""Kinds of one set of pairs; the more there are, the sooner the worst is the worst by chance."""

PREFIX_WORDS = 2
"""Words of a question that tell how it begins: 'how many', 'what color', 'is there'."""

Name = TypeVar("Name", bound=Hashable)

_LENGTHS = ((1, "1 token"), (8, "2-8 tokens"), (32, "9-32 tokens"))
_LONGER = "33 or more tokens"


def kinds_of(pairs: Sequence[Pair], answer_tokens: Sequence[int]) -> list[str]:
    """The kind of each pair.

    Args:
        pairs: All that are reported together.
        answer_tokens: Length of the dense model's answer to each, end token not counted.

    Returns:
        One name per pair: the data's own kinds, where these are at least two, or groups of at least
        ``MIN_GROUP`` pairs by answer length and question prefix; ``OTHER`` for the rest.
    """
    named = [pair.kind for pair in pairs]
    if len({kind for kind in named if kind is not None}) > 1:
        return _fewest([OTHER if kind is None else kind for kind in named])
    least = max(MIN_GROUP, -(-len(pairs) // MAX_KINDS))
    lengths = [_length_class(count) for count in answer_tokens]
    begins = [_prefix(pair.question) for pair in pairs]
    prefixes = list(zip(lengths, begins, strict=True))
    frequent = _frequent(prefixes, least)
    divided = {length for length, _ in frequent}
    names = []
    for length, begin in prefixes:
        rest = f"{length}, {OTHER}" if length in divided else length
        names.append(f"{length}, '{begin} ...'" if (length, begin) in frequent else rest)
    large = _frequent(names, least)
    return [name if name in large else OTHER for name in names]


def _fewest(names: list[str]) -> list[str]:
    """The most frequent ``MAX_KINDS`` names at most, the rest as ``OTHER``."""
    counts = Counter(names)
    if len(counts) <= MAX_KINDS:
        return names
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    kept = set(ranked[: MAX_KINDS - 1])
    return [name if name in kept else OTHER for name in names]


def _frequent(names: Iterable[Name], least: int) -> set[Name]:
    return {name for name, count in Counter(names).items() if count >= least}


def _length_class(tokens: int) -> str:
    return next((name for most, name in _LENGTHS if tokens <= most), _LONGER)


def _prefix(question: str) -> str:
    """How a question begins, in lower case and without punctuation."""
    return " ".join(re.findall(r"\w+", question.lower())[:PREFIX_WORDS])
