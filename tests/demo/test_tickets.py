"""Tickets: drawn as recorded, asked about rightly, repeatable, split without overlap."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from demo_training.tickets_build import build_processor

from yopo.demo.glyphs.font import BITMAPS, GLYPHS
from yopo.demo.task import SPLITS, find_pair
from yopo.demo.tickets.questions import ANSWERS, KINDS, ORDINALS, candidates
from yopo.demo.tickets.tickets import (
    LARGE,
    LARGE_SHAPES,
    SHAPES,
    SMALL,
    SYMBOL_COLS,
    SYMBOL_ROWS,
    TASK,
    TILE_SIZE,
    Ticket,
    pairs,
)


def tickets(count: int, seed: int = 0) -> list[Ticket]:
    rng = random.Random(seed)
    return [TASK.draw(rng) for _ in range(count)]


def solve(lines: tuple[str, ...], question: str) -> str:
    """Answer a question from the lines, by reading its text; shares no code with the generator."""
    if question == "how many lines are there?":
        return ORDINALS[len(lines) - 1]
    if question == "read the ticket.":
        return ", ".join(read(*each) for each in zip(ORDINALS, lines, strict=False)) + "."
    match = re.fullmatch(r"(.*?)(?: in)? line (\w+)[?.]", question)
    line = lines[ORDINALS.index(match[2])]
    if match[1] == "read":
        return read(match[2], line) + "."
    return {"what is first": line[0], "what is last": line[-1]}[match[1]]


def read(ordinal: str, line: str) -> str:
    return f"line {ordinal} {' '.join(line)}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_is_what_the_lines_say(kind: str) -> None:
    drawn = tickets(60)
    asked = [(each.lines, *found) for each in drawn for found in candidates(each.lines, kind)]
    assert len(asked) >= 60
    for lines, question, answer in asked:
        assert solve(lines, question) == answer, question
        assert kind not in ANSWERS or answer in ANSWERS[kind]


def test_what_is_drawn_is_what_is_recorded() -> None:
    for ticket in tickets(30):
        look, image = ticket.look, ticket.canvas()
        assert image.shape == (TILE_SIZE * look.shape[0], TILE_SIZE * look.shape[1], 3)
        is_ink = (image == look.ink).all(-1)
        is_table = (image == look.table).all(-1)
        offsets = iter(look.offsets)
        expected = np.zeros_like(is_ink)
        for row, line in enumerate(ticket.lines):
            for col, symbol in enumerate(line):
                down, right = next(offsets)
                top = (look.corner[0] + row) * SYMBOL_ROWS + down
                left = (look.corner[1] + col) * SYMBOL_COLS + right
                shape = np.kron(BITMAPS[symbol], np.ones((2, 2), bool))
                expected[top : top + 14, left : left + 10] = shape
                for start, size in ((top, 14), (left, 10)):  # no symbol lies across two tiles
                    assert start // TILE_SIZE == (start + size - 1) // TILE_SIZE
        assert (is_ink == expected).all() and next(offsets, None) is None
        area = len(ticket.lines) * SYMBOL_ROWS * max(map(len, ticket.lines)) * SYMBOL_COLS
        assert (~is_table).sum() == area  # ink and paper are unlike the table


def test_the_paper_tells_lines_and_places_apart() -> None:
    ticket = next(each for each in tickets(500) if len(each.lines) == 6 and len(each.lines[0]) == 8)
    paper = ticket.canvas()[ticket.look.corner[0] * SYMBOL_ROWS :].astype(int)
    paper = paper[:96, ticket.look.corner[1] * SYMBOL_COLS :][:, :96]
    is_paper = paper[..., 1] == ticket.look.green
    reds, blues = (
        [np.unique(paper[line][is_paper[line]][:, channel]) for line in lines]
        for channel, lines in (
            (0, [np.s_[row] for row in range(96)]),
            (2, [np.s_[:, col] for col in range(96)]),
        )
    )
    for levels in (reds, blues):
        found = [int(level) for each in levels for level in each]
        assert len(found) == 96  # one level per row or column of pixels
        assert found == sorted(found) and found[-1] - found[0] > 140


def test_pictures_have_many_sizes_and_the_processor_cuts_them_into_their_tiles() -> None:
    drawn = tickets(300)
    images = [ticket.render() for ticket in drawn]
    assert len({image.size for image in images}) > 200
    cut = build_processor().image_processor(images, return_tensors="pt")
    tiles = [rows * cols for rows, cols in (ticket.look.shape for ticket in drawn)]
    assert cut["num_patches"].tolist() == [each if each == 1 else each + 1 for each in tiles]
    counts = Counter(ticket.look.shape for ticket in drawn)
    assert set(counts) == set(SHAPES) and min(counts.values()) > 10
    starts = np.cumsum(cut["num_patches"]) - cut["num_patches"].numpy()
    for ticket, start in zip(drawn, starts, strict=True):
        rows, cols = ticket.look.shape
        made = cut["pixel_values"][start : start + rows * cols]  # (tile, 3, 48, 48)
        made = made.unflatten(0, (rows, cols)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
        meant = ticket.canvas() / 255
        found = made.numpy() * [0.26862954, 0.26130258, 0.27577711]
        found += [0.48145466, 0.4578275, 0.40821073]
        assert np.abs(found - meant).mean() < 0.08  # scaled back to the canvas, a little blurred


def test_splits_share_no_ticket_and_do_not_depend_on_the_drawing() -> None:
    digests = {
        (task.stream, split): {
            t.digest() for t in itertools.islice(task.split_pictures(split), 200)
        }
        for task in (TASK, SMALL, LARGE)
        for split in SPLITS
    }
    for (one, left), (other, right) in itertools.combinations(digests, 2):
        if left != right:
            assert not digests[one, left] & digests[other, right]
    for (_, split), found in digests.items():
        expected = {"heldout": {0}, "calibration": {1}}.get(split, set(range(2, 10)))
        assert {int(digest, 16) % 10 for digest in found} == expected
    ticket = tickets(1)[0]
    redrawn = replace(ticket, look=replace(ticket.look, green=ticket.look.green + 1))
    assert redrawn.digest() == ticket.digest() and redrawn.render() != ticket.render()


def test_pairs_repeat_are_balanced_and_do_not_depend_on_the_count() -> None:
    one = list(pairs("heldout", 320))
    find_pair.cache_clear()
    other = list(pairs("heldout", 10))
    for a, b in zip(one[:10], other, strict=True):
        assert (a.question, a.answer, a.kind, a.id) == (b.question, b.answer, b.kind, b.id)
        assert a.image.tobytes() == b.image.tobytes()
    assert [p.kind for p in one[:4]] == list(KINDS[:-1]) == list(TASK.short_kinds)
    for kind, answers in ANSWERS.items():
        counts = Counter(p.answer for p in one if p.kind == kind)
        assert sum(counts.values()) == 80 and set(counts) <= set(answers)
        assert max(counts.values()) / 80 < 1 / len(answers) + 0.15


def test_turns_ask_each_question_once_and_read_the_ticket_last() -> None:
    kinds = set()
    for ticket, asked in itertools.islice(TASK.turns("train"), 100):
        assert ticket.split() == "train"
        questions = [turn.question for turn in asked]
        assert len(set(questions)) == len(questions) >= 4
        assert "all" not in [turn.kind for turn in asked[:-1]]
        for turn in asked:
            assert (turn.question, turn.answer) in candidates(ticket.lines, turn.kind)
            kinds.add(turn.kind)
    assert kinds == set(KINDS)


def test_small_and_large_tickets() -> None:
    for task, shapes in ((SMALL, {(1, 1)}), (LARGE, set(LARGE_SHAPES))):
        drawn = list(itertools.islice(task.split_pictures("heldout"), 60))
        assert {ticket.look.shape for ticket in drawn} == shapes
        assert {pair.kind for pair in task.pairs("heldout", 10)} == set(task.short_kinds)


def test_symbols_are_as_often_one_as_another() -> None:
    counts = Counter("".join("".join(ticket.lines) for ticket in tickets(400)))
    assert set(counts) == set(GLYPHS)
    assert max(counts.values()) < 1.5 * min(counts.values())
