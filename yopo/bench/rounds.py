"""Times as they are taken, round by round, and what they say about one another."""

from __future__ import annotations

from dataclasses import dataclass, field

from yopo.bench.result import DENSE, PRUNED, STOCK, Compared, Rates, Shipped


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one prefill, and per decode step behind it."""

    prefill: float
    decode: float | None


@dataclass
class Rounds:
    """Samples of everything that is timed, and the machine's rates beside them."""

    samples: dict[str, list[Sample]]
    rates: list[Rates] = field(default_factory=list)

    def prefill(self, name: str, beside: str = DENSE) -> Compared:
        """Summarise the prefills of one of the names, ``beside`` another."""
        dense, other = ([each.prefill for each in self.samples[side]] for side in (beside, name))
        return Compared.of(dense, other)

    def decode(self, name: str, beside: str = DENSE) -> Compared | None:
        """Summarise the decode steps likewise; None if they were skipped."""
        dense, other = (
            [each.decode for each in self.samples[side] if each.decode is not None]
            for side in (beside, name)
        )
        return Compared.of(dense, other) if dense else None

    def shipped(self) -> Shipped | None:
        """Pruned beside stock, if stock was timed."""
        if STOCK not in self.samples:
            return None
        return Shipped(self.prefill(PRUNED, STOCK), self.decode(PRUNED, STOCK))
