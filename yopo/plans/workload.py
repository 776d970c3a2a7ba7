"""The prompt that costs are quoted for: its images, its text, and where the text stands. No torch.

A visual token attends to the text before it. Most of that text precedes the first image, but some
families write text inside images: a break after every row (Pixtral, Mistral 3), a tag before every
crop (Idefics3), a time stamp before every frame of a video (Qwen3-VL).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from yopo.plans.grid import Block, Grid

MAX_IMAGES, MAX_VISUAL, MAX_TEXT = 1 << 10, 1 << 17, 1 << 24
"""Maximum images, visual tokens and text tokens of a workload."""


@dataclass(frozen=True)
class Workload:
    """The prompt that FLOPs and bytes are quoted for: image grids and number of text tokens.

    Attributes:
        grids: The images of one prompt.
        text: Text tokens of one prompt.
        text_before: Those before the first image (visual queries attend to them).
        text_between: Those between each image and the next; empty: none anywhere.
        row_ends: Those after each row of an image but its last.
    """

    grids: tuple[Grid, ...]
    text: int
    text_before: int = 0
    text_between: tuple[int, ...] = ()
    row_ends: int = 0

    @property
    def visual(self) -> int:
        """Visual tokens of one prompt."""
        return sum(grid.tokens for grid in self.grids)

    @property
    def text_inside(self) -> int:
        """Text tokens between the first visual token and the last."""
        in_rows = self.row_ends * sum(grid.rows - 1 for grid in self.grids)
        return sum(self.text_between) + in_rows

    def starts(self) -> list[tuple[int, int]]:
        """(visual tokens, text tokens) before the first token of each image."""
        between = self.text_between or (0,) * (len(self.grids) - 1)
        visual = accumulate((grid.tokens for grid in self.grids[:-1]), initial=0)
        gaps = (
            self.row_ends * (grid.rows - 1) + gap
            for grid, gap in zip(self.grids[:-1], between, strict=True)
        )
        return list(zip(visual, accumulate(gaps, initial=self.text_before), strict=True))

    def text_seen(self, block: Block, starts: list[tuple[int, int]]) -> int:
        """Text tokens before the last query of a block of image rows.

        Args:
            block: One of this prompt's.
            starts: From :meth:`starts`.
        """
        visual, text = starts[block.image]
        row = (block.stop - 1 - visual) // self.grids[block.image].cols
        return text + self.row_ends * row

    def moved(self, *, grids: tuple[Grid, ...] | None = None, text: int | None = None) -> Workload:
        """This prompt with other images or another number of text tokens.

        Text that stood between or inside the images then follows them, as in synthetic prompts.
        """
        text = self.text if text is None else text
        return replace(
            self,
            grids=self.grids if grids is None else grids,
            text=text,
            text_before=min(self.text_before, text),
            text_between=(),
            row_ends=0,
        )


def workload_problem(workload: Workload) -> tuple[tuple[str, ...], str] | None:
    """What is wrong with a workload: a path of keys and the rest of a sentence, or None."""
    grids = ("workload", "grids")
    if not workload.grids or any(min(each.rows, each.cols) < 1 for each in workload.grids):
        return grids, "must hold at least one image of at least one token"
    if len(workload.grids) > MAX_IMAGES:
        return grids, f"must hold at most {MAX_IMAGES} images, found {len(workload.grids)}"
    if workload.visual > MAX_VISUAL:
        return grids, f"must hold at most {MAX_VISUAL} visual tokens, found {workload.visual}"
    if workload.text > MAX_TEXT:
        return ("workload", "text"), f"must be at most {MAX_TEXT}, found {workload.text}"
    if not 0 <= workload.text_before <= workload.text:
        return ("workload", "text_before"), "must lie between 0 and workload.text"
    return _inner_problem(workload)


def _inner_problem(workload: Workload) -> tuple[tuple[str, ...], str] | None:
    """The first problem of the text between and inside images."""
    between, gaps = ("workload", "text_between"), len(workload.grids) - 1
    if workload.text_between and len(workload.text_between) != gaps:
        found = len(workload.text_between)
        return between, f"must have a number for each of the {gaps} gaps, found {found}"
    if min(workload.text_between, default=0) < 0:
        return between, "must not be negative"
    if workload.row_ends < 0:
        return ("workload", "row_ends"), "must not be negative"
    if workload.text_before + workload.text_inside > workload.text:
        return ("workload", "text"), (
            f"must be at least the {workload.text_before + workload.text_inside} tokens before, "
            "between and inside the images"
        )
    return None
