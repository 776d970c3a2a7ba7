"""Grids of glyphs are drawn as recorded, with correct questions, repeatable, split disjointly."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from yopo.demo.glyphs.font import BITMAPS, GLYPHS
from yopo.demo.glyphs.grids import CELL_SIZE, IMAGE_SIZE, SHIFTED, TASK, GlyphGrid, pairs
from yopo.demo.glyphs.questions import (
    ANSWERS,
    COLORS,
    EMPTY,
    GRID,
    KINDS,
    NUMBERS,
    ORDINALS,
    Cell,
    candidates,
)
from yopo.demo.task import SPLITS, find_pair

Rows = list[list[Cell | None]]


def grids(count: int, seed: int = 0) -> list[GlyphGrid]:
    rng = random.Random(seed)
    return [TASK.draw(rng) for _ in range(count)]


def rows_of(grid: GlyphGrid) -> Rows:
    return [list(grid.cells[start : start + GRID]) for start in range(0, GRID * GRID, GRID)]


def solve(rows: Rows, question: str) -> str:
    """Answer a question from the cells, by reading its text; shares no code with the generator."""
    if match := re.fullmatch(r"what (is at|color is) row (\w+) column (\w+)\?", question):
        cell = rows[ORDINALS.index(match[2])][ORDINALS.index(match[3])]
        return cell.glyph if match[1] == "is at" else cell.color
    if match := re.fullmatch(r"is there one at row (\w+) column (\w+)\?", question):
        return "yes" if rows[ORDINALS.index(match[1])][ORDINALS.index(match[2])] else "no"
    if match := re.fullmatch(r"how many are in row (\w+)\?", question):
        return NUMBERS[sum(cell is not None for cell in rows[ORDINALS.index(match[1])])]
    if match := re.fullmatch(r"what color is row (\w+)\?", question):
        return line("row", match[1], rows[ORDINALS.index(match[1])], "color") + "."
    if match := re.fullmatch(r"read column (\w+)\.", question):
        return line("column", match[1], [row[ORDINALS.index(match[1])] for row in rows]) + "."
    if match := re.fullmatch(r"read row (\w+)\.", question):
        return line("row", match[1], rows[ORDINALS.index(match[1])]) + "."
    assert question == "read the grid."
    lines = [line("row", name, row) for name, row in zip(ORDINALS, rows, strict=True)]
    return ", ".join(lines) + "."


def line(name: str, ordinal: str, cells: list[Cell | None], part: str = "glyph") -> str:
    return " ".join([name, ordinal, *(getattr(cell, part) if cell else EMPTY for cell in cells)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_follows_from_the_cells(kind: str) -> None:
    drawn = grids(60)
    asked = [(rows_of(grid), *found) for grid in drawn for found in candidates(grid.cells, kind)]
    assert len(asked) >= 60
    for rows, question, answer in asked:
        assert solve(rows, question) == answer, question
        assert kind not in ANSWERS or answer in ANSWERS[kind]


def test_glyphs_differ_and_lookalikes_differ_only_slightly() -> None:
    assert len(GLYPHS) == len(set(GLYPHS)) == 24
    for one, other in itertools.combinations(GLYPHS, 2):
        assert (BITMAPS[one] != BITMAPS[other]).any(), (one, other)
    for one, other in ("1I", "8B", "0O", "EF", "PR"):
        assert (BITMAPS[one] != BITMAPS[other]).sum() <= 4


def test_drawings_match_their_records() -> None:
    for grid in grids(20):
        pixels = grid.pixels()
        blank = replace(grid, cells=(None,) * GRID**2).pixels()
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert grid.render().tobytes() == pixels.tobytes()
        is_ink = (pixels != blank).any(-1)
        for index, cell in enumerate(grid.cells):
            row, col = (CELL_SIZE * part for part in divmod(index, GRID))
            box = np.s_[row : row + CELL_SIZE, col : col + CELL_SIZE]
            if cell is None:
                assert not is_ink[box].any()
                continue
            top, left = grid.look.offsets[index]
            shape = np.kron(BITMAPS[cell.glyph], np.ones((2, 2), bool))
            expected = np.zeros((CELL_SIZE, CELL_SIZE), bool)
            expected[top : top + 14, left : left + 10] = shape  # glyphs never leave their cells
            assert (is_ink[box] == expected).all()
            (ink,) = np.unique(pixels[box][expected], axis=0)
            distances = {c: np.abs(ink.astype(int) - rgb).sum() for c, rgb in COLORS.items()}
            assert min(distances, key=distances.get) == cell.color


def test_the_paper_distinguishes_rows_and_columns() -> None:
    pixels = replace(grids(1)[0], cells=(None,) * GRID**2).pixels().astype(int)
    assert (np.diff(pixels[:, 0, 0]) >= 0).all() and (np.diff(pixels[0, :, 2]) >= 0).all()
    assert pixels[-1, 0, 0] - pixels[0, 0, 0] > 60 and pixels[0, -1, 2] - pixels[0, 0, 2] > 60


def test_splits_share_no_grid_and_do_not_depend_on_the_drawing() -> None:
    digests = {
        split: {g.digest() for g in itertools.islice(TASK.split_pictures(split), 300)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not digests[one] & digests[other]
    for split, expected in zip(SPLITS, ({0}, {1}, set(range(2, 10))), strict=True):
        assert {int(digest, 16) % 10 for digest in digests[split]} == expected
    grid = grids(1)[0]
    redrawn = replace(grid, look=replace(grid.look, green=grid.look.green + 1))
    assert redrawn.digest() == grid.digest() and redrawn.render() != grid.render()


def test_pairs_repeat_are_balanced_and_do_not_depend_on_the_count() -> None:
    one = list(pairs("heldout", 560))
    find_pair.cache_clear()
    other = list(pairs("heldout", 12))
    for a, b in zip(one[:12], other, strict=True):
        assert (a.question, a.answer, a.kind, a.id) == (b.question, b.answer, b.kind, b.id)
        assert a.image.tobytes() == b.image.tobytes()
    assert [p.kind for p in one[:7]] == list(KINDS[:-1]) == list(TASK.short_kinds)
    for kind, answers in ANSWERS.items():
        counts = Counter(p.answer for p in one if p.kind == kind)
        assert sum(counts.values()) == 80 and set(counts) <= set(answers)
        assert max(counts.values()) / 80 < 1 / len(answers) + 0.15


def test_turns_ask_each_question_once_and_read_the_grid_last() -> None:
    kinds = set()
    for grid, asked in itertools.islice(TASK.turns("train"), 100):
        assert grid.split() == "train"
        questions = [turn.question for turn in asked]
        assert len(set(questions)) == len(questions) >= 6
        assert "grid" not in [turn.kind for turn in asked[:-1]]
        for turn in asked:
            assert (turn.question, turn.answer) in candidates(grid.cells, turn.kind)
            kinds.add(turn.kind)
    assert kinds == set(KINDS)


def test_shifted_grids_are_emptier_dimmer_and_noisy() -> None:
    for split in SPLITS:
        shifted = list(itertools.islice(SHIFTED.split_pictures(split), 30))
        assert {grid.split() for grid in shifted} == {split}
        filled = [cell is not None for grid in shifted for cell in grid.cells]
        assert 0.15 < sum(filled) / len(filled) < 0.3
        for grid in shifted:
            inks = [i for cell, i in zip(grid.cells, grid.look.inks, strict=True) if cell]
            assert all(max(ink) <= 0.8 * 255 for ink in inks)
            assert (grid.pixels() == grid.pixels()).all()
    corners = grid.pixels()[:4, :4].reshape(-1, 3)
    assert len(np.unique(corners, axis=0)) > 8  # no two pixels of noisy paper are alike
