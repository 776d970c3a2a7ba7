"""Training batches for the ticket reader: tickets and turns as tensors, and where to look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import InternVLProcessor

from demo_training.rows import IGNORED, ChatForm, RowPacker
from demo_training.tickets_build import END, IMAGE, IMAGE_END, IMAGE_START, START, TILE_SIDE
from yopo.demo.glyphs.font import GLYPHS
from yopo.demo.task import Turn
from yopo.demo.tickets.questions import MAX_LINES, ORDINALS
from yopo.demo.tickets.tickets import (
    MAX_LENGTH,
    SYMBOL_COLS,
    SYMBOL_ROWS,
    TASK,
    TILE_SIZE,
    Ticket,
)

LABELS = {"symbol": 1 + len(GLYPHS), "line": 1 + MAX_LINES, "place": 1 + MAX_LENGTH, "thumbnail": 2}
"""What `token_labels` says of a visual token, and how many classes that has."""

_TURNS_LENGTH = 170  # tokens of a talk's turns
_TOKEN_SIZE = TILE_SIZE // TILE_SIDE

Cell = tuple[int, int]


def pixel_values(processor: InternVLProcessor, tickets: Sequence[Ticket]) -> Tensor:
    """Cut the pictures of tickets of one shape into tiles: (ticket * tile, 3, 48, 48)."""
    images = [ticket.render() for ticket in tickets]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def token_labels(ticket: Ticket) -> Tensor:
    """Say of each visual token what the symbol's place that its center lies in holds.

    Returns:
        (token, 4) int64, tile after tile, one column per entry of `LABELS`: the symbol (0: none),
        line and place in it, from 1 (0: not on the ticket), and whether it is of the thumbnail.
    """
    rows, cols = ticket.look.shape
    side = np.arange(TILE_SIDE) * _TOKEN_SIZE + _TOKEN_SIZE // 2
    tiles = [
        _labels_at(ticket, row * TILE_SIZE + side, col * TILE_SIZE + side)
        for row in range(rows)
        for col in range(cols)
    ]
    if len(tiles) > 1:
        tiles.append(np.tile([0, 0, 0, 1], (TILE_SIDE**2, 1)))
    return torch.from_numpy(np.concatenate(tiles))


def _labels_at(ticket: Ticket, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Labels of the canvas's points of these rows and columns, in reading order."""
    lines, (top, left) = ticket.lines, ticket.look.corner
    width, found = max(map(len, lines)), []
    for y in ys:
        for x in xs:
            row, col = int(y) // SYMBOL_ROWS - top, int(x) // SYMBOL_COLS - left
            is_paper = 0 <= row < len(lines) and 0 <= col < width
            symbol = lines[row][col : col + 1] if is_paper else ""
            named = 1 + GLYPHS.index(symbol) if symbol else 0
            found.append((named, 1 + row, 1 + col, 0) if is_paper else (0, 0, 0, 0))
    return np.array(found)


def tower_batches(
    processor: InternVLProcessor, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tiles (tile, 3, 48, 48) and labels (tile, token, 4) of as many tickets."""
    tickets = TASK.split_pictures("train", seed=seed)
    while True:
        batch = [next(tickets) for _ in range(batch_size)]
        labels = torch.cat([token_labels(ticket) for ticket in batch])
        yield pixel_values(processor, batch), labels.unflatten(0, (-1, TILE_SIDE**2))


def places(ticket: Ticket, turn: Turn) -> list[Cell | None]:
    """Say of each word of an answer which (line, place) it is read off, from 0; None: nowhere."""
    words = turn.answer.replace(",", " ,").replace(".", " .").split()
    if turn.kind == "lines":
        return [(len(ticket.lines) - 1, 0)]
    if turn.kind in ("line", "all"):
        return _places_read(words)
    line = ORDINALS.index(turn.question.rstrip("?").split()[-1])
    return [(line, 0 if turn.kind == "first" else len(ticket.lines[line]) - 1)]


def _places_read(words: list[str]) -> list[Cell | None]:
    found: list[Cell | None] = []
    line = place = 0
    for before, word in zip(["", *words], words, strict=False):
        if before == "line":
            line, place = ORDINALS.index(word), 0
        is_symbol = word in GLYPHS
        found.append((line, place) if is_symbol else None)
        place += is_symbol
    return found


class Packer(RowPacker):
    """Packs turns after one picture's visual tokens in the form of InternVL's chat template."""

    def __init__(self, processor: InternVLProcessor, num_visual: int) -> None:
        """Take the tokenizer; a packer is for pictures of one number of visual tokens."""
        tokenizer = processor.tokenizer
        start, user, assistant, end, image, opening, closing = tokenizer.convert_tokens_to_ids(
            [START, "user", "assistant", END, IMAGE, IMAGE_START, IMAGE_END]
        )
        prefix = (start, user, opening, *[image] * num_visual, closing)
        form = ChatForm(
            prefix=prefix,
            next_position=len(prefix),
            turn=(start, user),
            reply=(end, start, assistant),
            end=end,
            row_length=len(prefix) + _TURNS_LENGTH,
        )
        super().__init__(tokenizer, form)
        self.visual = slice(3, 3 + num_visual)

    def targets(
        self, tickets: Sequence[Ticket], asked: Sequence[tuple[Turn, ...]], labels: Tensor
    ) -> Tensor:
        """Say where the visual tokens are that each answer's word is read off.

        Args:
            tickets: one per row.
            asked: the turns that `batch` packed.
            labels: the rows' labels (row, token), of `batch`.

        Returns:
            (row, query, key) bool: what the token that predicts the word should look at.
        """
        found = torch.zeros(*labels.shape, labels.shape[1], dtype=torch.bool)
        for index, (ticket, turns) in enumerate(zip(tickets, asked, strict=True)):
            seen = token_labels(ticket)
            cells = [cell for turn in turns for cell in (*places(ticket, turn), None)]
            asking = (labels[index] != IGNORED).nonzero().flatten() - 1
            for query, cell in zip(asking.tolist(), cells, strict=False):
                if cell is not None:
                    is_there = (seen[:, 1] == 1 + cell[0]) & (seen[:, 2] == 1 + cell[1])
                    found[index, query, self.visual] = is_there
        return found


def decoder_batches(
    processor: InternVLProcessor, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield model inputs with labels on the answers only, and `looked_at` of `Packer.targets`.

    Pictures of a batch have one number of tiles, so that rows need no padding between.
    """
    packers: dict[int, Packer] = {}
    waiting: dict[tuple[int, int], list] = defaultdict(list)
    for ticket, turns in TASK.turns("train", seed=seed):
        rows = waiting[ticket.look.shape]
        rows.append((ticket, turns))
        if len(rows) < batch_size:
            continue
        tickets, asked = zip(*rows, strict=True)
        rows.clear()
        pixels = pixel_values(processor, tickets)
        num_visual = len(pixels) // batch_size * TILE_SIDE**2
        packer = packers.setdefault(num_visual, Packer(processor, num_visual))
        batch = packer.batch(asked)
        looked_at = packer.targets(tickets, asked, batch["labels"])
        yield {"pixel_values": pixels, **batch, "looked_at": looked_at}
