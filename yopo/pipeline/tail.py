"""How close a plan is to the dense model, as its provenance has it: means, and what they hide."""

from __future__ import annotations

from collections.abc import Sequence

from yopo.evaluation.fidelity import Fidelity, worst_kind
from yopo.plans.quality import marks
from yopo.plans.schema import PruningPlan


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


def quality_entry(plan: PruningPlan, found: Fidelity, kinds: Sequence[str]) -> dict[str, object]:
    """What a plan records of its own quality (see ``plans.quality``).

    Args:
        plan: The chosen plan.
        found: Its closeness to the dense model on the comparison pairs.
        kinds: The kind of each of them.
    """
    parts = {name: _entry(part) for name, part in found.split(kinds).items()}
    agreement = {"agreement": round(found.agreement, 6)}
    return {**_entry(found), **agreement, "kinds": parts, "of": marks(plan)}


def _entry(found: Fidelity) -> dict[str, object]:
    pairs = len(found.by_pair)
    return {
        "pairs": pairs,
        "kl": float(f"{found.kl:.4g}"),
        "whole_answers": round(found.whole_answers / pairs, 6),
    }
