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

    def compared(self, name: str, what: str, beside: str = DENSE) -> Compared | None:
        """Summarise ``prefill`` or ``decode`` of one of the names, ``beside`` another."""
        dense, other = (
            [getattr(each, what) for each in self.samples[side]] for side in (beside, name)
        )
        return None if None in dense else Compared.of(dense, other)

    def shipped(self) -> Shipped | None:
        """Pruned beside stock, if stock was timed."""
        if STOCK not in self.samples:
            return None
        return Shipped(*(self.compared(PRUNED, what, STOCK) for what in ("prefill", "decode")))
