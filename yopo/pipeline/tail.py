"""What the mean of a plan's divergence hides, as the plan's provenance has it."""

from __future__ import annotations

from collections.abc import Sequence

from yopo.evaluation.fidelity import Fidelity, worst_kind


def tail_of(found: Fidelity, kinds: Sequence[str]) -> dict[str, object]:
    """Whole answers and the worst kind of pair.

    Args:
        found: Closeness to the dense model on the comparison pairs.
        kinds: The kind of each of them.
    """
    parts = found.split(kinds)
    worst = worst_kind(parts)
    return {
        "whole_answers": round(found.whole_answers / len(found.by_pair), 6),
        "worst_kind": worst,
        "worst_kl": float(f"{parts[worst].kl:.4g}"),
    }
