"""The generated questions are correct, unambiguous, balanced, repeatable and split disjointly."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import pytest

from yopo.demo.questions import ANSWERS, KINDS, SHORT_KINDS, candidates
from yopo.demo.scenes import (
    IMAGE_SIZE,
    Scene,
    SceneObject,
    pairs,
    random_scene,
    split_scenes,
    turns,
)
from yopo.demo.task import SPLITS, find_pair
from yopo.demo.vocabulary import COLORS, COLUMNS, NUMBERS, PLURALS, ROWS, SHAPES

SINGULARS = {plural: shape for shape, plural in PLURALS.items()}


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def named(objects: tuple[SceneObject, ...], words: str) -> list[SceneObject]:
    """Select objects by words, as a reader would, sharing no code with the generator."""
    found = list(objects)
    at = re.search(r"at the (\w+) (\w+)", words)
    if at:
        found = [o for o in found if (ROWS[o.row], COLUMNS[o.col]) == at.groups()]
        words = words[: at.start()]
    for word in words.split():
        word = SINGULARS.get(word, word)
        found = [o for o in found if word in (o.color, o.shape) or word in ("object", "objects")]
    return found


def only(found: list[SceneObject]) -> SceneObject:
    assert len(found) == 1, "ambiguous or empty"
    return found[0]


def solve(objects: tuple[SceneObject, ...], question: str) -> str:
    """Answer a question from the objects, by reading its text."""
    if match := re.fullmatch(r"what (color|shape) is the (.*)\?", question):
        return getattr(only(named(objects, match[2])), match[1])
    if match := re.fullmatch(r"how many (.*) are there\?", question):
        return NUMBERS[len(named(objects, match[1]))]
    if match := re.fullmatch(r"is there a (.*)\?", question):
        return "yes" if named(objects, match[1]) else "no"
    if match := re.fullmatch(r"where is the (.*)\?", question):
        item = only(named(objects, match[1]))
        return f"{ROWS[item.row]} {COLUMNS[item.col]}"
    match = re.fullmatch(r"is the (.*) (left of|right of|above|below) the (.*)\?", question)
    assert match, question
    one, other = only(named(objects, match[1])), only(named(objects, match[3]))
    axis = 0 if match[2] in ("above", "below") else 1
    offset = other.center[axis] - one.center[axis]
    assert abs(offset) > 8, "a relation too close to call"
    return "yes" if (offset > 0) == (match[2] in ("left of", "above")) else "no"


@pytest.mark.parametrize("kind", SHORT_KINDS)
def test_every_answer_follows_from_the_objects(kind: str) -> None:
    asked = [(s.objects, *found) for s in scenes(150) for found in candidates(s.objects, kind)]
    assert len(asked) > 200
    for objects, question, answer in asked:
        assert solve(objects, question) == answer, question
        assert answer in ANSWERS[kind]


def test_descriptions_are_long_and_name_all_objects_in_reading_order() -> None:
    described = [(s.objects, c) for s in scenes(200) for c in candidates(s.objects, "description")]
    assert len(described) > 50
    for objects, (_, answer) in described:
        places = [(o.row, o.col) for o in objects]
        assert places == sorted(places)
        phrases = answer.removesuffix(".").split(", ")
        assert [only(named(objects, p.removeprefix("a "))) for p in phrases] == list(objects)
        assert len(re.findall(r"\w+|[,.]", answer)) >= 30


def test_drawings_match_their_records() -> None:
    for scene in scenes(60):
        image = scene.render()
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
        seen = {color: index for index, color in enumerate(o.rgb for o in scene.objects)}
        labels = scene.render_indices()
        for row, col in itertools.product(range(IMAGE_SIZE), repeat=2):
            label = labels.getpixel((col, row))
            pixel = image.getpixel((col, row))
            if not label:
                assert pixel == (scene.background,) * 3
                continue
            item = scene.objects[label - 1]
            assert pixel in seen and pixel == item.rgb
            assert (row * 3 // IMAGE_SIZE, col * 3 // IMAGE_SIZE) == (item.row, item.col)


def test_shapes_are_drawn_differently() -> None:
    drawings = set()
    for shape in SHAPES:
        item = SceneObject("red", shape, 1, 1, (32, 32), 8, COLORS["red"])
        drawings.add(Scene((item,), 0).render_indices().tobytes())
    assert len(drawings) == len(SHAPES)


def test_objects_of_a_scene_differ_in_color_or_shape() -> None:
    for scene in scenes(300):
        looks = {(o.color, o.shape) for o in scene.objects}
        assert 2 <= len(looks) == len(scene.objects) <= 5


def test_splits_share_no_scene() -> None:
    digests = {
        split: {s.digest() for s in itertools.islice(split_scenes(split), 400)} for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not digests[one] & digests[other]
    for split, expected in zip(SPLITS, ({0}, {1}, set(range(2, 10))), strict=True):
        assert {int(digest, 16) % 10 for digest in digests[split]} == expected


def test_the_split_does_not_depend_on_the_drawing() -> None:
    scene = scenes(1)[0]
    redrawn = Scene(scene.objects, background=scene.background + 1)
    assert redrawn.digest() == scene.digest()


def test_pairs_repeat_and_do_not_depend_on_the_count() -> None:
    one = list(pairs("heldout", 24))
    find_pair.cache_clear()
    other = list(pairs("heldout", 12))
    for a, b in zip(one[:12], other, strict=True):
        assert (a.question, a.answer, a.kind, a.id) == (b.question, b.answer, b.kind, b.id)
        assert a.image.tobytes() == b.image.tobytes()
    moved = list(pairs("heldout", 24, seed=1))
    assert [p.image.tobytes() for p in one] != [p.image.tobytes() for p in moved]
    assert len({p.id for p in one + moved}) == 48


def test_kinds_come_in_turn_and_answers_are_balanced() -> None:
    found = list(pairs("heldout", 1200))
    assert [p.kind for p in found[:6]] == list(SHORT_KINDS)
    for kind in SHORT_KINDS:
        counts = Counter(p.answer for p in found if p.kind == kind)
        assert sum(counts.values()) == 200
        assert set(counts) == set(ANSWERS[kind])
        assert max(counts.values()) / 200 < 1 / len(ANSWERS[kind]) + 0.1


def test_pairs_can_be_only_descriptions() -> None:
    assert {p.kind for p in pairs("train", 5, kinds=("description",))} == {"description"}


@pytest.mark.parametrize(
    ("split", "kinds"), [("test", None), ("train", ("colour",)), ("train", ())]
)
def test_unknown_names_are_refused(split: str, kinds: tuple[str, ...] | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        list(pairs(split, 1, kinds=kinds))


def test_turns_ask_each_question_once_and_describe_last() -> None:
    kinds = set()
    for scene, asked in itertools.islice(turns("train"), 200):
        assert scene.split() == "train"
        questions = [turn.question for turn in asked]
        assert len(set(questions)) == len(questions) >= 5
        assert "description" not in [turn.kind for turn in asked[:-1]]
        for turn in asked:
            assert (turn.question, turn.answer) in candidates(scene.objects, turn.kind)
            kinds.add(turn.kind)
    assert kinds == set(KINDS)
