"""What a plan says of its own quality: how far it was measured to stray from the dense model.

Calibration records it in the provenance, which people may edit: whatever is misshapen there counts
as absent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from yopo.plans.schema import LEVERS, PruningPlan

OPTIMISTIC = "the plan was chosen on these pairs, so other pairs may lose more"
"""What every report of it has to say."""


@dataclass(frozen=True)
class Measured:
    """Closeness to the dense model on some pairs.

    Attributes:
        pairs: How many.
        kl: Logit KL per answer token, in nats.
        whole_answers: Share of pairs whose whole answer is predicted as the dense model does.
    """

    pairs: int
    kl: float
    whole_answers: float


@dataclass(frozen=True)
class Quality(Measured):
    """Closeness to the dense model on the comparison pairs.

    Attributes:
        agreement: Share of answer tokens that are predicted as the dense model does.
        kinds: The same by kind of pair; empty in plans of former versions.
        is_current: Whether the plan still is what was measured; false after it was edited.
    """

    agreement: float | None
    kinds: Mapping[str, Measured]
    is_current: bool = True

    @property
    def worst_kind(self) -> str | None:
        """The kind of the largest KL, if kinds are known."""
        return max(self.kinds, key=lambda name: self.kinds[name].kl, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def marks(plan: PruningPlan) -> str:
    """A digest of what a plan prunes, which baking it does not change (it renumbers heads)."""
    rows = [
        (
            *(len(layer.read_heads), len(layer.attend_heads), layer.radius, layer.neurons),
            *(getattr(layer, each.name) for each in LEVERS),
        )
        for layer in plan.layers
    ]
    text = repr((rows, plan.compensation, plan.bidirectional))
    if plan.reduction is not None:
        text += repr(plan.reduction.to_dict())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def quality_of(plan: PruningPlan) -> Quality | None:
    """What calibration measured of a plan; None where nothing was measured."""
    entry = plan.provenance.get("quality")
    if not isinstance(entry, Mapping):
        return _former(plan.provenance)
    try:
        kinds = {str(name): _measured(each) for name, each in (entry.get("kinds") or {}).items()}
        whole = _measured(entry)
        agreement = float(entry["agreement"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return Quality(**vars(whole), agreement=agreement, kinds=kinds, is_current=_same(entry, plan))


def _same(entry: Mapping[str, Any], plan: PruningPlan) -> bool:
    return entry.get("of") == marks(plan)


def _measured(entry: Mapping[str, Any]) -> Measured:
    return Measured(int(entry["pairs"]), float(entry["kl"]), float(entry["whole_answers"]))


def _former(provenance: Mapping[str, Any]) -> Quality | None:
    """The quality in plans of former versions: that of the best candidate."""
    try:
        best = provenance["candidates"][0]
        pairs = int(provenance["split"]["comparison"])
        measured = Measured(pairs, float(best["kl"]), float(best["whole_answers"]))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return Quality(**vars(measured), agreement=None, kinds={})
