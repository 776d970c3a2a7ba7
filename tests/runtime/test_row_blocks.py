"""Blocks of rows split work that is independent per token, and change no result."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_prefill import PROMPTS, check_plan
from tiny import Subject

from yopo.runtime import row_blocks
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference

SIZES = [(1, 7, 3), (4, 2, 3), (5, 3, 3), (3, 10, 2), (2, 1, 1)]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens of width 3 per block; tiny prompts would fit into one shipped block."""
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 4 * 3 * 4)
    monkeypatch.setattr(row_blocks, "PIECE_BYTES", 4 * 3 * 4)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_blocks_cover_every_element_once_in_contiguous_pieces(size: tuple[int, int, int]) -> None:
    states = torch.zeros(size)
    for place in row_blocks.blocks(states):
        states[place] += 1
        assert states[place].is_contiguous()
        assert states[place].nbytes <= max(row_blocks.BLOCK_BYTES, states[0, 0].nbytes)
    assert torch.equal(states, torch.ones(size))


@torch.no_grad()
def test_no_block_of_a_row_is_left_with_a_few_tokens() -> None:
    states = torch.zeros(2, 13, 3)
    places = list(row_blocks.blocks(states, 4 * 3 * 4))
    lengths = [states[place].shape[1] for place in places]
    assert lengths == 2 * [3, 3, 3, 4]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_pieces_are_computed_separately_and_keep_their_inputs(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(row_blocks, "PIECE_BYTES", 4 * 3 * 4)
    states, seen = torch.randn(size), []
    before = states.clone()
    found = row_blocks.mapped(states, lambda piece: seen.append(piece.nbytes) or torch.sin(piece))
    assert torch.equal(found, torch.sin(before)) and torch.equal(states, before)
    assert sum(seen) == states.nbytes
    assert max(seen) <= max(row_blocks.PIECE_BYTES, states[0, 0].nbytes)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("size", SIZES)
def test_sums_are_in_place_unless_gradients_are_recorded(size: tuple[int, int, int]) -> None:
    states, more = torch.randn(size), torch.randn(size)
    expected = states + torch.sin(states) + more
    found = row_blocks.add(states, lambda block, place: torch.sin(block) + more[place])
    assert found is not states
    assert torch.equal(row_blocks.replace(states, torch.sin), torch.sin(states))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert row_blocks.add(states, lambda block, place: torch.sin(block) + more[place]) is states
        torch.testing.assert_close(states, expected)
        assert row_blocks.replace(states, torch.sin) is states
        torch.testing.assert_close(states, torch.sin(expected))


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_any_plan_matches_the_reference_in_blocks(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, name: str, tokens: int
) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", tokens * subject.shape.hidden * 4)
    monkeypatch.setattr(row_blocks, "PIECE_BYTES", (tokens + 1) // 2 * subject.shape.hidden * 4)
    check_plan(subject, tokens, tiny.batch(PROMPTS[name]))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_match_the_reference(subject: Subject, seed: int) -> None:
    plan = subject.random_plan(seed)
    inputs = tiny.batch(PROMPTS["one image each, padded"])
    embeddings = subject.model.get_input_embeddings().weight
    found = []
    for run in (pruned, reference):
        with run(subject.model, plan):
            logits = subject.model(**inputs).logits[tiny.real_text(inputs)]
            loss = logits.float().logsumexp(-1).sum()
            found.append(torch.autograd.grad(loss, embeddings)[0])
    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
