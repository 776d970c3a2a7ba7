"""A budget in milliseconds, converted by the measurements of `yopo bench --json`.

Prefill time is linear in the executed FLOPs (scripts/README.md, "Speed"), so the two points that a
benchmark measures, dense and pruned, give a line: milliseconds = fixed + slope x FLOPs. A budget in
milliseconds becomes the visual budget whose prefill FLOPs, text included, are on that line.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yopo.plans.flops import dense_prefill_flops
from yopo.plans.schema import ModelShape, Workload
from yopo.support.errors import DataError, PlanError

_WIDTHS = ("hidden", "heads", "kv_heads", "head_dim", "ffn")


@dataclass(frozen=True)
class Costs:
    """The cost of prefilling one prompt on some machine.

    Attributes:
        fixed: Milliseconds per layer and prompt beyond the FLOPs (launches, norms, copies).
        slope: Milliseconds per FLOP.
    """

    fixed: float
    slope: float

    def budget(self, milliseconds: float, shape: ModelShape, workload: Workload) -> float:
        """The visual budget, in (0, 1], whose prefill takes this long.

        Raises:
            PlanError: Text alone takes longer.
        """
        text = Workload(workload.grids[:0], workload.text, 0)
        least = self.fixed * shape.layers + self.slope * dense_prefill_flops(shape, text)
        most = self.fixed * shape.layers + self.slope * dense_prefill_flops(shape, workload)
        if milliseconds <= least:
            raise PlanError(
                f"A prefill in {milliseconds:g} ms is out of reach: its text alone takes "
                f"{least:.3g} ms, the dense model {most:.3g} ms.",
                remedy="Allow more milliseconds, or give a share of the visual FLOPs.",
            )
        return min(1.0, (milliseconds - least) / (most - least))


def read_costs(path: str | Path, shape: ModelShape) -> Costs:
    """Read the output of ``yopo bench --json``.

    Args:
        path: Its output.
        shape: Dimensions of the model to plan for; the benchmark may have had fewer layers.

    Raises:
        DataError: Not a benchmark, or of another width, or its two times do not differ.
    """
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        measured, flops, layers = found["prefill_ms"], found["prefill_flops"], found["shape"]
        times = [measured[name]["median"] for name in ("dense", "pruned")]
        work = [flops[name] for name in ("dense", "pruned")]
        batch = found["prompt"]["batch"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not an output of `yopo bench --json`: {error}.",
            remedy="Create it with `yopo bench ... --json > costs.json`.",
        ) from error
    other = [name for name in _WIDTHS if layers.get(name) != asdict(shape)[name]]
    if other:
        raise DataError(
            f"{path}: was measured at {other[0]} {layers.get(other[0])}, the model's is "
            f"{asdict(shape)[other[0]]}.",
            remedy="Time this model's shape.",
        )
    slope = (times[0] - times[1]) / max(work[0] - work[1], 1)
    if slope <= 0:
        raise DataError(f"{path}: pruned took as long as dense, so FLOPs have no measurable cost.")
    fixed = max(0.0, (times[0] - slope * work[0]) / (batch * layers["layers"]))
    return Costs(fixed, slope)
