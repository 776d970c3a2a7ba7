"""Choose the visual tokens of a batch of prompts by a reduction, image by image.

What a reduction sees of a forward: the projected tokens of every image, and the question, which is
the text after the last image as far as the prompt goes (all text before it if there is none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from yopo.models.answer_tokens import prompt_ends
from yopo.models.streams import Stream, TokenLayout, build_layout
from yopo.plans.grid import Grid
from yopo.reduction.method import Images, Method, Question, Selection
from yopo.support.errors import ModelError

_Place = tuple[int, int, int]
"""A batch row, an image's place among those of the row, its first token in the visual stream."""


@dataclass(frozen=True)
class Chosen:
    """The choice for one image.

    Attributes:
        start: Its first token along the row's visual tokens.
        tokens: Its number of tokens.
        kept: (kept,) int64, ascending, within the image.
        mixing: (kept, tokens) float32, or None: kept tokens keep their features.
    """

    start: int
    tokens: int
    kept: torch.Tensor
    mixing: torch.Tensor | None

    def features(self, values: torch.Tensor) -> torch.Tensor:
        """(visual tokens of the row, width) values to (kept, width)."""
        own = values[self.start : self.start + self.tokens]
        if self.mixing is None:
            return own[self.kept]
        kind = torch.promote_types(own.dtype, torch.float32)
        return (self.mixing.to(own.device, kind) @ own.to(kind)).to(own.dtype)


@dataclass(frozen=True)
class Reduced:
    """A forward whose visual stream holds fewer tokens; they keep their places in the sequence.

    Attributes:
        layout: The text of the prompts, and the kept tokens: each image a column of them.
        whole: All visual tokens.
        dropped: Those that are not kept.
        rows: The choice for every image of every row.
    """

    layout: TokenLayout
    whole: Stream
    dropped: Stream
    rows: list[list[Chosen]]

    def features(self, values: torch.Tensor) -> torch.Tensor:
        """(batch, visual, width) of all visual tokens to (batch, kept, width), 0 on padding."""
        size = (len(values), self.layout.visual.length, values.shape[-1])
        kept = values.new_zeros(size)
        for number, row in enumerate(self.rows):
            start = 0
            for each in row:
                stop = start + len(each.kept)
                kept[number, start:stop] = each.features(values[number])
                start = stop
        return kept


def reduce(
    method: Method | None,
    layout: TokenLayout | None,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> Reduced | None:
    """Reduce the visual tokens of a forward.

    Args:
        method: The reduction, if there is any.
        layout: Where text and images are; None: there are no images.
        embeds: (batch, sequence, hidden), image features merged in.
        attention_mask: (batch, cached + sequence) with 0 on padding, or None.

    Returns:
        None if all tokens are kept.
    """
    if method is None or layout is None:
        return None
    batch, length, _ = embeds.shape
    real = None
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -length:].bool()
    places = torch.arange(length, device=embeds.device).expand(batch, -1)
    rows = choose(method, layout, embeds, prompt_ends(places, real), real)
    if rows is None:
        return None
    is_visual = layout.visual.marks(length)
    is_kept = torch.zeros_like(is_visual)
    for number, row in enumerate(rows):
        for each in row:
            is_kept[number, layout.visual.index[number, each.start + each.kept]] = True
    grids = [tuple(Grid(len(each.kept), 1) for each in row) for row in rows]
    kept = build_layout(is_kept, grids).visual
    dropped = build_layout(is_visual & ~is_kept, grids).visual
    return Reduced(TokenLayout(layout.text, kept, tuple(grids)), layout.visual, dropped, rows)


def choose(
    method: Method,
    layout: TokenLayout,
    embeds: torch.Tensor,
    ends: torch.Tensor,
    real: torch.Tensor | None,
) -> list[list[Chosen]] | None:
    """Choose tokens of every image of every row.

    Args:
        method: The reduction.
        layout: Where text and images are.
        embeds: (batch, sequence, hidden), image features merged in.
        ends: (batch,) int64, position of each prompt's last token; an answer may follow.
        real: (batch, sequence) bool, False on padding; None: no padding.

    Returns:
        The images of every row; None if nothing is dropped.

    Raises:
        ModelError: The method needs the tower's attention, which is not there.
    """
    if all(_is_whole(method, grid) for grids in layout.grids for grid in grids):
        return None
    if method.needs_attention and layout.attention is None:
        raise ModelError(
            f"{method.name} needs the vision tower's attention on these images, and they were not "
            "encoded by this model while it could be recorded.",
            remedy="Pass pixels, or encode and prefill the images one after the other.",
        )
    visual = layout.visual.gather(embeds)
    question = _question(layout, embeds, ends, real) if method.uses_prompt else None
    found: dict[tuple[int, int], Chosen] = {}
    for grid, places in _by_grid(layout.grids).items():
        chosen = _of(method, visual, question, layout.attention, grid, places)
        for place, each in zip(places, chosen, strict=True):
            found[place[:2]] = each
    return [[found[row, at] for at in range(len(grids))] for row, grids in enumerate(layout.grids)]


def _is_whole(method: Method, grid: Grid) -> bool:
    return method.count((grid.rows, grid.cols)) == grid.tokens


def _by_grid(rows: Sequence[Sequence[Grid]]) -> dict[Grid, list[_Place]]:
    """The places of all images of each size."""
    places: dict[Grid, list[_Place]] = {}
    for row, grids in enumerate(rows):
        start = 0
        for number, grid in enumerate(grids):
            places.setdefault(grid, []).append((row, number, start))
            start += grid.tokens
    return places


def _of(
    method: Method,
    visual: torch.Tensor,
    question: Question | None,
    attention: torch.Tensor | None,
    grid: Grid,
    places: Sequence[_Place],
) -> list[Chosen]:
    """The choices for images of one size."""
    if _is_whole(method, grid):
        everything = torch.arange(grid.tokens, device=visual.device)
        return [Chosen(start, grid.tokens, everything, None) for _, _, start in places]
    where = [(row, slice(start, start + grid.tokens)) for row, _, start in places]
    features = torch.stack([visual[each] for each in where])
    if attention is not None:
        attention = torch.stack([attention[each] for each in where]).to(features.device)
    rows = torch.tensor([row for row, _, _ in places], device=visual.device)
    images = Images(
        features,
        (grid.rows, grid.cols),
        None if question is None else _at(question, rows),
        attention,
        numbers=[number for _, number, _ in places],
    )
    return _split(method.select(images), [start for _, _, start in places], grid.tokens)


def _split(selection: Selection, starts: Sequence[int], tokens: int) -> list[Chosen]:
    mixing: Sequence[torch.Tensor | None] = [None] * len(starts)
    if selection.mixing is not None:
        mixing = list(selection.mixing)
    every = zip(starts, selection.kept, mixing, strict=True)
    return [Chosen(start, tokens, kept, mixed) for start, kept, mixed in every]


def _at(question: Question, rows: torch.Tensor) -> Question:
    ids = None if question.ids is None else question.ids[rows]
    return Question(question.embeds[rows], question.weights[rows], ids)


def _question(
    layout: TokenLayout, embeds: torch.Tensor, ends: torch.Tensor, real: torch.Tensor | None
) -> Question:
    """The words of every row's question, and zero weight on all others."""
    text = layout.text
    is_word = text.index <= ends[:, None]
    if real is not None:
        is_word = is_word & real.gather(1, text.index)
    if text.mask is not None:
        is_word = is_word & text.mask
    visual = layout.visual.index
    if layout.visual.mask is not None:
        visual = visual.masked_fill(~layout.visual.mask, -1)
    after = is_word & (text.index > visual.amax(dim=1, keepdim=True))
    words = torch.where(after.any(dim=1, keepdim=True), after, is_word)
    used = words.any(dim=0).nonzero()[:, 0]
    ids = None
    if layout.ids is not None:
        ids = layout.ids.to(used.device).gather(1, text.index)[:, used]
    return Question(text.gather(embeds)[:, used], words[:, used].float(), ids)
