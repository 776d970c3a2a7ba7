"""Writing what a calibration made: the plan, its tensors, the statistics; and saying so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from yopo.console import note, show
from yopo.errors import OutputError
from yopo.files import check_writable, write_file

if TYPE_CHECKING:
    from yopo.plan import Plan
    from yopo.tuning import Calibrated


def check_outputs(output: str, stats: Path | None, *, force: bool) -> None:
    """Refuse outputs that could not be written, before the long work.

    Raises:
        OutputError: A file exists, has no folder, or two outputs would be one file.
    """
    paths = [] if stats is None else [stats]
    if output != "-":
        plan = Path(output)
        paths += [plan, plan.with_name(f"{plan.stem}.safetensors")]
    taken = [path.absolute() for path in paths]
    for path in paths:
        if taken.count(path.absolute()) > 1:
            raise OutputError(
                f"{path}: two outputs would have this name.",
                remedy="The plan's tensors stand beside it as NAME.safetensors; choose other "
                "names for the plan or the statistics.",
            )
    check_writable(paths, force=force)


def save(made: Calibrated, output: str, *, stats: Path | None, force: bool) -> None:
    """Write a calibration's results and say in one line what was written."""
    from yopo.plan_tensors import write_plan

    if made.candidates:
        _show_candidates(made.plan)
    if stats is not None:
        write_file(stats, made.statistics.to_bytes())
        note(f"{stats}: statistics of {len(made.statistics.rho)} pairs.")
    plan = write_plan(made.plan, made.tensors, output, force=force)
    note(_written(plan, output))


def _show_candidates(plan: Plan) -> None:
    from yopo.report.tables import candidate_table

    split = plan.provenance.get("split", {})
    show(candidate_table(plan.provenance["candidates"], split.get("held_out")))


def _written(plan: Plan, output: str) -> str:
    from yopo.flops import dense_prefill_flops, prefill_flops
    from yopo.report import units

    prefill = prefill_flops(plan) / dense_prefill_flops(plan.model.shape, plan.workload)
    asked = "" if plan.budget.asked is None else f" of {units.share(plan.budget.asked)} asked"
    return (
        f"{'Plan' if output == '-' else output}: visual budget "
        f"{units.share(plan.budget.reached)}{asked}, prefill FLOPs {units.share(prefill)}."
    )
