"""Writes the results of a calibration (plan, tensors, statistics) and reports them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from yopo.support.console import is_verbose, note, show, warn
from yopo.support.errors import OutputError, YopoError
from yopo.support.files import STATISTICS, check_writable, write_file
from yopo.support.launched import is_first

if TYPE_CHECKING:
    from yopo.calibration.statistics import Statistics
    from yopo.pipeline.session import Calibrated
    from yopo.plans.schema import PruningPlan


SHOWN = 5
"""Candidates that are shown, best first, unless all are asked for."""


def check_outputs(outputs: Iterable[str], stats: Path | None, *, force: bool) -> None:
    """Refuse outputs that cannot be written, before the long work.

    Args:
        outputs: Plan files, or ``-``.
        stats: The statistics file, if requested.
        force: Whether files of the same kind may be replaced.

    Raises:
        OutputError: A file exists, has no folder, or two outputs are the same file.
    """
    from yopo.plans.side_file import check_plan_writable

    plans = [Path(output) for output in outputs if output != "-"]
    paths = [*plans, *([] if stats is None else [stats])]
    taken = [os.path.abspath(path) for path in paths]
    for path in paths:
        if taken.count(os.path.abspath(path)) > 1:
            raise OutputError(f"{path}: two outputs have this name.")
    for plan in plans:
        check_plan_writable(plan, force=force)
    if stats is not None:
        check_writable(stats, STATISTICS, force=force)


class Keeper:
    """Saves statistics as soon as they exist, so that a later failure does not lose them.

    Args:
        path: The requested file; None keeps them in the cache if making a plan fails.
        force: Whether existing statistics may be replaced.
    """

    def __init__(self, path: Path | None, *, force: bool):
        self._path, self._force = path, force
        self._statistics: Statistics | None = None

    def keep(self, statistics: Statistics) -> None:
        """Keep statistics that were just made."""
        self._statistics = statistics
        if self._path is not None and is_first():
            check_writable(self._path, STATISTICS, force=self._force)  # an hour may have passed
            folder = self._path.absolute().parent
            write_file(self._path, statistics.to_bytes(folder))
            note(f"{self._path}: statistics of {len(statistics.rho)} pairs.")

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Report where the statistics are if the block fails to make a plan."""
        try:
            yield
        except Exception as error:
            if self._statistics is not None:
                self._report(self._statistics, error)
            raise

    def _report(self, statistics: Statistics, error: Exception) -> None:
        path = self._path or (self._rescue(statistics) if is_first() else None)
        if path is None:
            return
        sentence = f"The statistics are not lost: `yopo plan {path}` makes plans from them."
        if isinstance(error, YopoError):
            error.remedy = f"{error.remedy} {sentence}" if error.remedy else sentence
        else:
            warn(sentence)

    @staticmethod
    def _rescue(statistics: Statistics) -> Path | None:
        from yopo.plans.storage import cache_directory

        data = statistics.to_bytes(cache_directory())
        name = f"statistics-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        try:
            write_file(cache_directory() / name, data)
        except OutputError:  # the plan's failure is what matters
            return None
        return cache_directory() / name


def save(made: Calibrated, output: str, *, force: bool) -> None:
    """Write a plan and report it in one line; of several processes, the first does."""
    from yopo.plans.storage import write_plan

    if not is_first():
        return
    if made.candidates:
        _show_candidates(made.plan)
    write_plan(made.plan, output, force=force)
    note(written(made.plan, output))


def _show_candidates(plan: PruningPlan) -> None:
    from yopo.report.candidates import CandidateTable

    split, found = plan.provenance.get("split", {}), plan.provenance["candidates"]
    shown = found if is_verbose() else found[:SHOWN]
    show(CandidateTable(shown, split.get("comparison", split.get("held_out"))))
    if len(found) > len(shown):
        note(f"   and {len(found) - len(shown)} more, which -v and the plan list")


def written(plan: PruningPlan, output: str) -> str:
    """What is said of a plan that was written."""
    from yopo.plans.flops import dense_prefill_flops, prefill_flops
    from yopo.report import units

    prefill = prefill_flops(plan) / dense_prefill_flops(plan.model.shape, plan.workload)
    asked = "" if plan.budget.asked is None else f" of {units.share(plan.budget.asked)} requested"
    return (
        f"{'Plan' if output == '-' else output}: visual budget "
        f"{units.share(plan.budget.reached)}{asked}, prefill FLOPs {units.share(prefill)}."
    )
