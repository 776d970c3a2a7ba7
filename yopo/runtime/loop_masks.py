"""The masks that the layers of one forward read, as a list of tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from yopo.runtime.attention_masks import AttentionMasks, VisualBlock

if TYPE_CHECKING:
    from yopo.runtime.weights import VisualLayer


@dataclass(frozen=True)
class LoopMasks:
    """Masks and blocks, all made.

    Attributes:
        text: (1 or batch, 1, text, text) bool; None: causal, or everything allowed.
        reading: (1 or batch, 1, text, visual + text) bool; None: everything allowed, or no layer
            reads.
        blocks: Blocks of visual attention by radius, where any visual token attends.
        sequence: (keys,) int64, prompt order of keys; None where no block is in it.
    """

    text: torch.Tensor | None
    reading: torch.Tensor | None
    blocks: dict[int | None, list[VisualBlock]]
    sequence: torch.Tensor | None

    @classmethod
    def of(cls, masks: AttentionMasks, parts: Iterable[VisualLayer], *, reads: bool) -> LoopMasks:
        """Make all that layers will ask for.

        Args:
            masks: Of this forward.
            parts: The modules of visual tokens of the layers that this forward's tokens pass.
            reads: Whether any layer has heads that read visual tokens.
        """
        radii = {part.plan.radius: None for part in parts if part.plan.attend_heads}
        blocks = {radius: masks.visual_blocks(radius) for radius in radii}
        in_sequence = any(block.in_sequence for each in blocks.values() for block in each)
        return cls(
            masks.text_mask,
            masks.reading_mask if reads else None,
            blocks,
            masks.sequence if in_sequence else None,
        )

    def applied_to(self, masks: AttentionMasks) -> AttentionMasks:
        """Masks of a forward with these in place of what it would make."""
        return masks.fixed(self.text, self.reading, self.blocks, self.sequence)

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in the order in which ``on`` takes them."""
        single = (self.text, self.reading, self.sequence)
        every = (block.mask for blocks in self.blocks.values() for block in blocks)
        return [each for each in (*single, *every) if each is not None]

    def on(self, tensors: Iterator[torch.Tensor]) -> LoopMasks:
        """The same in other tensors."""

        def other(one: torch.Tensor | None) -> torch.Tensor | None:
            return None if one is None else next(tensors)

        text, reading, sequence = (other(e) for e in (self.text, self.reading, self.sequence))
        blocks = {
            radius: [replace(block, mask=other(block.mask)) for block in each]
            for radius, each in self.blocks.items()
        }
        return LoopMasks(text, reading, blocks, sequence)

    def structure(self) -> Hashable:
        """All but the tensors' contents and sizes."""
        blocks = tuple(
            (radius, tuple(_structure(block) for block in each))
            for radius, each in self.blocks.items()
        )
        return self.text is None, self.reading is None, self.sequence is None, blocks

    def lengthened(self, count: int) -> LoopMasks:
        """For ``count`` more tokens after every row's text, which only they themselves read."""
        if not count:
            return self
        text, reading = (_lengthened(each, count) for each in (self.text, self.reading))
        return replace(self, text=text, reading=reading)


def _structure(block: VisualBlock) -> Hashable:
    bounds = (block.start, block.stop, block.key_start, block.key_stop, block.num_text)
    return (*bounds, block.mask is None, block.in_sequence)


def _lengthened(mask: torch.Tensor | None, count: int) -> torch.Tensor | None:
    if mask is None:
        return None
    longer = pad(mask, (0, count, 0, count))
    longer[:, :, -count:] = True  # they read everything: no row of a softmax is empty
    return longer
