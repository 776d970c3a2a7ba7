"""What an allocation may do to a layer, and how finely it tries it."""

from __future__ import annotations

from dataclasses import dataclass

RANKS = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Bottlenecks tried in addition to none, as shares of the hidden width."""

MAPS = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Ranks of the linear map tried, as shares of the hidden width."""

WIDTHS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Shares of the FFN tried."""


@dataclass(frozen=True)
class Levers:
    """The levers that an allocation may use; an ablation restricts them.

    Attributes:
        ranks: Bottlenecks tried in addition to none, as shares of the hidden width.
        maps: Ranks of the linear map tried, as shares of the hidden width.
        widths: Shares of the FFN tried.
        attend: Whether visual tokens may attend.
        everywhere: Whether all heads must read in all layers, and visual tokens that attend have no
            radius, as an inference engine requires.
    """

    ranks: tuple[float, ...] = RANKS
    maps: tuple[float, ...] = MAPS
    widths: tuple[float, ...] = WIDTHS
    attend: bool = True
    everywhere: bool = False
