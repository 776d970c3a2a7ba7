"""The times of all rounds, and comparisons of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from yopo.bench.result import DENSE, PRUNED, STOCK, Compared, Rates, Shipped


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one prefill, and per decode step after it.

    Attributes:
        prefill: The prefill's.
        decode: A step's; None without steps.
        is_replayed: Whether the prefill was replayed from a CUDA graph.
    """

    prefill: float
    decode: float | None
    is_replayed: bool = False


@dataclass
class Rounds:
    """Samples of everything that is timed, with the machine's rates."""

    samples: dict[str, list[Sample]]
    rates: list[Rates] = field(default_factory=list)

    def prefill(self, name: str, against: str = DENSE) -> Compared:
        """Compare the prefills of one of the names with those of another."""
        dense, other = ([each.prefill for each in self.samples[side]] for side in (against, name))
        return Compared.of(dense, other)

    def decode(self, name: str, against: str = DENSE) -> Compared | None:
        """Compare decode steps in the same way; None if they were skipped."""
        dense, other = (
            [each.decode for each in self.samples[side] if each.decode is not None]
            for side in (against, name)
        )
        return Compared.of(dense, other) if dense else None

    def are_replayed(self, *names: str) -> bool:
        """Whether all prefills of these names were replayed from CUDA graphs."""
        return all(each.is_replayed for name in names for each in self.samples[name])

    def shipped(self) -> Shipped | None:
        """Pruned compared with stock, if stock was timed."""
        if STOCK not in self.samples:
            return None
        return Shipped(self.prefill(PRUNED, STOCK), self.decode(PRUNED, STOCK))
