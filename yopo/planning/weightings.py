"""How much each kind of estimated damage counts: what an allocation is made by, and which to try.

The estimate of ``planning.allocate`` cannot determine these parameters, so allocations by several
are fitted and measured: even ones over the decades of the visual weight, then ones near the best,
then generations of random variations of the best, layer by layer. The fitted plans of one budget
differ by a factor of three and more in their logit KL; estimates rank them poorly, measurements on
pairs that nothing was fitted on rank them well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random

from yopo.strategies.neighbors import PAPER_RADIUS

VISUAL_WEIGHTS = tuple(10.0 ** (half / 2) for half in range(-2, 5))
"""Visual weights tried first: 0.1 to 100, two per decade."""

NEAR = 10.0**0.25
"""Factor from the best visual weight to its neighbors."""

SPREAD = 0.8
"""Standard deviation of the logarithm of a random factor."""


@dataclass(frozen=True)
class Weighting:
    """Parameters that the estimate cannot determine: how much each kind of damage counts.

    Attributes:
        visual_weight: Damage of an error in visual states over damage of one in reading.
        radius: Neighborhood in which visual tokens attend.
        reading: (layers,) factors on the value of reading in a layer.
        visual: (layers,) factors on the value of visual states after a layer.
    """

    visual_weight: float
    radius: int | None
    reading: tuple[float, ...]
    visual: tuple[float, ...]

    @classmethod
    def even(cls, visual_weight: float, radius: int | None, layers: int) -> Weighting:
        """The weighting with equal factors for all layers."""
        return cls(visual_weight, radius, (1.0,) * layers, (1.0,) * layers)

    @property
    def is_even(self) -> bool:
        """Whether all layers have equal factors."""
        return set(self.reading) == set(self.visual) == {1.0}

    def __str__(self) -> str:
        varied = "" if self.is_even else " and layer factors"
        where = "" if self.radius is None else f", radius {self.radius}"
        return f"visual weight {self.visual_weight:.3g}{varied}{where}"

    def scaled(self, factors: Iterable[float]) -> tuple[Weighting, ...]:
        """The same with other visual weights."""
        return tuple(replace(self, visual_weight=self.visual_weight * each) for each in factors)

    def varied(self, random: Random) -> Weighting:
        """A random variation: every factor, and the visual weight, times a log-normal number."""

        def vary(values: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(each * random.lognormvariate(0.0, SPREAD) for each in values)

        (visual_weight,) = vary((self.visual_weight,))
        return Weighting(visual_weight, self.radius, vary(self.reading), vary(self.visual))


def even_weightings(layers: int) -> tuple[Weighting, ...]:
    """Those to try first for a decoder of some layers."""
    return tuple(Weighting.even(each, None, layers) for each in VISUAL_WEIGHTS)


def near(weighting: Weighting) -> tuple[Weighting, ...]:
    """Those to try next: with the paper's radius or without one, and with neighboring weights."""
    other = PAPER_RADIUS if weighting.radius is None else None
    return replace(weighting, radius=other), *weighting.scaled((NEAR, 1 / NEAR))


def around(weighting: Weighting | None) -> tuple[Weighting, ...]:
    """A weighting and those near it; none for None."""
    return () if weighting is None else (weighting, *near(weighting))
