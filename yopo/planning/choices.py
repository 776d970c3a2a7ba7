"""Choices for the parts of a layer, and how the rest of a budget is spent on better ones.

At one price per FLOP for all layers a choice can cost more than the budget has left, while the next
cheaper one leaves much of it unspent, the more of it the smaller the budget is. So the rest goes to
single changes, the one that prevents most damage per FLOP first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yopo.plans.schema import LayerPlan


@dataclass(frozen=True)
class Choice:
    """A candidate for a part of a layer, with its cost and damage.

    Attributes:
        layer: The layer's plan, as far as the part goes.
        flops: FLOPs of visual tokens.
        damage: Estimated damage.
        kv: Share of the dense model's visual KV bytes.
    """

    layer: LayerPlan
    flops: int
    damage: float
    kv: float = 0.0


Choices = tuple[Choice, ...]
"""One choice for every part."""


def spend_rest(
    chosen: Choices, options: Sequence[Sequence[Choice]], room: int, fits: Callable[[Choices], bool]
) -> Choices:
    """Replace choices by costlier ones that do less damage, as long as any fits.

    Args:
        chosen: The choice made for every part.
        options: What each part could have instead.
        room: FLOPs left.
        fits: Whether choices are within every other limit.
    """
    while True:
        steps = [
            ((now.damage - each.damage) / (each.flops - now.flops), part, each)
            for part, now in enumerate(chosen)
            for each in options[part]
            if 0 < each.flops - now.flops <= room and each.damage < now.damage
        ]
        for _, part, each in sorted(steps, key=lambda step: -step[0]):
            changed = (*chosen[:part], each, *chosen[part + 1 :])
            if fits(changed):
                room -= each.flops - chosen[part].flops
                chosen = changed
                break
        else:
            return chosen
