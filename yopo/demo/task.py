"""Common parts of the demo tasks: pictures in disjoint splits, questions of several kinds.

Everything follows from the seed. Train, calibration and held-out pictures are disjoint by
construction: a digest of what a picture shows (not of how it is drawn) decides its split, so a
held-out arrangement is never seen in training, not even drawn a little differently.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

from PIL import Image

SPLITS = ("heldout", "calibration", "train")
Candidates = list[tuple[str, str]]


class Picture(Protocol):
    """A picture as tasks use it."""

    def split(self) -> str:
        """Return the split that the picture belongs to."""

    def render(self) -> Image.Image:
        """Draw it."""


P = TypeVar("P", bound=Picture)


@dataclass(frozen=True)
class DemoPair:
    """An image, a question about it and its only right answer."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    id: str


@dataclass(frozen=True)
class Turn:
    """One question and answer of a longer conversation about the same picture."""

    question: str
    answer: str
    kind: str


def digest(text: str) -> str:
    """Return a stable hex digest of what a picture shows."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_of(hex_digest: str) -> str:
    """Return "heldout", "calibration" or "train": digest modulo 10 is 0, 1 or the rest."""
    return SPLITS[min(int(hex_digest, 16) % 10, 2)]


@dataclass(frozen=True, eq=False)
class Task(Generic[P]):
    """A kind of pictures and the questions about them.

    Attributes:
        stream: Prefix of the names of all random streams; it determines the pictures.
        pictures: Name of the pictures in the name of their stream.
        draw: Draws a picture of any split.
        candidates: Lists all (question, answer) of one kind that a picture allows; may be empty.
        kinds: All kinds; ``long_kind`` is the last.
        answers: The answers that a kind can have, each equally likely in ``pairs``; kinds that are
            not named here have too many to balance.
        turn_kinds: Kinds of a conversation's turns, some several times.
        num_turns: Number of turns of a conversation.
        long_kind: The kind with long answers, which are harder (every token must be right) and
            only used if named.
        long_turns: Number of turns that a long one counts as, to keep conversations similar in
            length.
        long_share: The share of conversations that end with a long turn.
    """

    stream: str
    pictures: str
    draw: Callable[[random.Random], P]
    candidates: Callable[[P, str], Candidates]
    kinds: tuple[str, ...]
    answers: Mapping[str, tuple[str, ...]]
    turn_kinds: tuple[str, ...]
    num_turns: int
    long_kind: str
    long_turns: int
    long_share: float

    @property
    def short_kinds(self) -> tuple[str, ...]:
        """All kinds but the long one."""
        return tuple(kind for kind in self.kinds if kind != self.long_kind)

    def split_pictures(self, split: str, *, seed: int = 0) -> Iterator[P]:
        """Yield pictures of one split without end."""
        check_split(split)
        rng = random.Random(f"{self.stream} {self.pictures}/{split}/{seed}")
        while True:
            picture = self.draw(rng)
            if picture.split() == split:
                yield picture

    def pairs(
        self, split: str, count: int, *, seed: int = 0, kinds: Sequence[str] | None = None
    ) -> Iterator[DemoPair]:
        """Yield `count` question-answer pairs, one picture each, the kinds in turn.

        The answer is drawn first, uniformly, and then pictures until one has a question with that
        answer, so that guessing the commonest answer gains nothing. Pair `i` does not depend on
        `count`.

        Args:
            split: "train", "calibration" or "heldout".
            count: number of pairs.
            seed: determines the pairs.
            kinds: kinds to cycle through. None means the short kinds.

        Raises:
            ValueError: for an unknown split or kind.
        """
        check_split(split)
        wanted = tuple(kinds) if kinds is not None else self.short_kinds
        if not wanted or not set(wanted) <= set(self.kinds):
            raise ValueError(f"kinds must be some of {', '.join(self.kinds)}; got {wanted!r}")
        for index in range(count):
            kind = wanted[index % len(wanted)]
            picture, question, answer = find_pair(self, split, seed, kind, index)
            name = f"{split}-{seed}-{index:05d}-{kind}"
            yield DemoPair(picture.render(), question, answer, kind, name)

    def turns(self, split: str, *, seed: int = 0) -> Iterator[tuple[P, tuple[Turn, ...]]]:
        """Yield pictures with several questions each, without end: the training data.

        A long answer comes last, so that it gives no other answer away.
        """
        rng = random.Random(f"{self.stream} turns/{split}/{seed}")
        for picture in self.split_pictures(split, seed=seed):
            is_long = rng.random() < self.long_share
            long = self.candidates(picture, self.long_kind) if is_long else []
            kinds = list(self.turn_kinds) * 2  # more than needed: some find no new question
            rng.shuffle(kinds)
            asked: dict[str, Turn] = {}
            for kind in kinds:
                if len(asked) == self.num_turns - self.long_turns * len(long):
                    break
                found = self.candidates(picture, kind)
                if found:
                    answer = rng.choice(sorted({answer for _, answer in found}))
                    question = rng.choice([q for q, a in found if a == answer])
                    asked[question] = Turn(question, answer, kind)
            final = [Turn(q, a, self.long_kind) for q, a in long]
            yield picture, (*asked.values(), *final)


@lru_cache(maxsize=4096)  # every stage of a calibration reads its pairs anew
def find_pair(task: Task[P], split: str, seed: int, kind: str, index: int) -> tuple[P, str, str]:
    """Find a picture of the split with a question of this kind, its answer drawn uniformly."""
    rng = random.Random(f"{task.stream} pairs/{split}/{seed}/{kind}/{index}")
    wanted = rng.choice(task.answers[kind]) if kind in task.answers else None
    while True:
        picture = task.draw(rng)
        if picture.split() != split:
            continue
        found = [c for c in task.candidates(picture, kind) if wanted in (None, c[1])]
        if found:
            return picture, *rng.choice(found)


def check_split(split: str) -> None:
    """Raise a ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
