"""Where plans are: a file of their own, or one of several in a baked checkpoint's directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from yopo.plans.file import read_document
from yopo.plans.schema import PruningPlan
from yopo.support.errors import CheckpointError, PlanError

PLAN_FILE = "yopo_plan.yaml"
"""The plan of a baked checkpoint."""

PLAN_FILES = "yopo_plan*.yaml"
"""All plans of a checkpoint: the first one and those baked with it."""


def refuse_unbaked(folder: Path, name: str) -> None:
    """Refuse a directory that is no baked checkpoint.

    Raises:
        CheckpointError: It holds no plan.
    """
    if not (folder / PLAN_FILE).is_file():
        raise CheckpointError(
            f"{name}: is not a pruned checkpoint (no {PLAN_FILE}).",
            remedy="Create one with `yopo apply plan.yaml`.",
        )


def plan_path(folder: Path, budget: float | None = None) -> Path:
    """The file of a checkpoint's first plan, or of the largest within a budget.

    Raises:
        CheckpointError: No plan is within the budget.
    """
    if budget is None:
        return folder / PLAN_FILE
    files = plan_files_in(folder)
    reached = [read_document(file)[0].budget.reached for file in files]
    place = largest_within(reached, budget)
    if place is None:
        known = ", ".join(f"{each:.3g}" for each in reached)
        raise CheckpointError(
            f"{folder}: has no plan within a visual budget of {budget}; it has {known}.",
            remedy="Pass one of these, or bake another plan with the others.",
        )
    return files[place]


def largest_within(reached: Sequence[float], budget: float) -> int | None:
    """The place of the largest of some plans' visual budgets that is within another, if any is."""
    within = [place for place, each in enumerate(reached) if each <= budget + 1e-9]
    return max(within, key=lambda place: reached[place], default=None)


def plan_files_in(folder: Path) -> list[Path]:
    """The files of all plans of a checkpoint, by name."""
    return sorted(folder.glob(PLAN_FILES))


def read_any(target: str, budget: float | None = None) -> PruningPlan:
    """The plan of a file, of stdin for ``-``, or of a checkpoint's directory, without its tensors.

    Args:
        target: Which.
        budget: Which of a checkpoint's plans; None: the first.

    Raises:
        PlanError: It cannot be read; or a budget is given for what is one plan.
        CheckpointError: The directory is no baked checkpoint, or has no plan within the budget.
    """
    folder = Path(target)
    if target == "-" or not folder.is_dir():
        if budget is not None:
            raise PlanError(f"{target}: is one plan; a budget selects among a checkpoint's plans.")
        return read_document(target)[0]
    refuse_unbaked(folder, target)
    return read_document(plan_path(folder, budget))[0]


def read_all(targets: Iterable[str]) -> list[tuple[str, PruningPlan]]:
    """Names and plans of targets as for :func:`read_any`; of a checkpoint, all of its plans.

    Raises:
        PlanError, CheckpointError: As for :func:`read_any`.
    """
    plans = []
    for target in targets:
        found = read_any(target)
        files = plan_files_in(Path(target)) if target != "-" and Path(target).is_dir() else []
        if len(files) > 1:
            plans += [(str(file), read_any(str(file))) for file in files]
        else:
            plans.append((target, found))
    return plans
