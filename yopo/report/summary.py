"""The full report on a plan, as printed by ``yopo inspect``."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from yopo.plans.schema import PruningPlan
from yopo.report.heatmap import Heatmap
from yopo.report.plan_tables import LayerTable, header, savings_table
from yopo.report.profile import Profile
from yopo.report.quality import quality_report


def plan_report(plan: PruningPlan) -> RenderableType:
    """Header, savings, quality, layers, and the calibration's measurements if the plan has them."""
    parts: list[RenderableType] = [header(plan), "", savings_table(plan), ""]
    parts += [quality_report(plan), "", LayerTable(plan), ""]
    if plan.measured is None:
        parts.append(Text("The plan has no measurements (no head map, no profile).", "dim"))
    else:
        parts += [Heatmap(plan), "", Profile(plan)]
    return Group(*parts)
