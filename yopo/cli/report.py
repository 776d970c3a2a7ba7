"""``yopo report``: a page on plans, what they save and lose, to read and to pass on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from yopo.cli.command import Command
from yopo.cli.next_step import YOURS, suggest_next
from yopo.cli.options import force_option
from yopo.cli.values import Share
from yopo.support.console import note
from yopo.support.errors import PlanError
from yopo.support.files import PAGE, check_writable, write_file

if TYPE_CHECKING:
    from yopo.plans.schema import PruningPlan

MOST = 16
"""Plans on a page at most."""


@click.command(cls=Command)
@click.argument("targets", nargs=-1, required=True, metavar="PLAN_OR_DIR...")
@click.option(
    "--eval",
    "evaluations",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="What `yopo eval -o FILE` wrote on one of the plans, examples included; repeatable.",
)
@click.option(
    "--bench",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `yopo bench --json` wrote.",
)
@click.option(
    "--budget",
    type=Share(),
    metavar="F",
    help="Show the largest plan within F first.  [default: the first plan]",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="report.html",
    show_default=True,
    help="The page; - for stdout.",
)
@force_option
def command(
    targets: tuple[str, ...],
    evaluations: tuple[Path, ...],
    bench: Path | None,
    budget: float | None,
    output: str,
    force: bool,
) -> None:
    """Write an HTML page on plans: what they save, what they lose, layer by layer.

    A plan is a file, or - for stdin; of a directory that `yopo apply` wrote, all plans are shown,
    with a slider between them. The page is one file that loads nothing from a network.
    """
    if output != "-":
        check_writable(Path(output), PAGE, force=force)
    from yopo.report.page.page import report_page
    from yopo.report.page.results import read_bench, read_evaluation

    plans = _read(targets)
    text = report_page(
        plans,
        evaluations=[(str(path), read_evaluation(path)) for path in evaluations],
        bench=None if bench is None else (str(bench), read_bench(bench)),
        chosen=_chosen([plan.budget.reached for _, plan in plans], budget),
        command=_command(targets, evaluations, bench, budget, output),
    )
    if output == "-":
        sys.stdout.write(text)
        return
    write_file(Path(output), text.encode())
    note(f"{output}: a page on {len(plans)} plan{'s' * (len(plans) > 1)}, {len(text) // 1000} kB.")
    if not evaluations:
        suggest_next("eval", targets[0], "--data", YOURS, "-o", "eval.json")


def _read(targets: tuple[str, ...]) -> list[tuple[str, PruningPlan]]:
    from yopo.plans.places import read_all

    plans = read_all(targets)
    if len(plans) > MOST:
        raise click.UsageError(f"Give at most {MOST} plans, found {len(plans)}.")
    return plans


def _chosen(reached: list[float], budget: float | None) -> int:
    """The number of the plan to show first."""
    if budget is None:
        return 0
    from yopo.plans.places import largest_within

    place = largest_within(reached, budget)
    if place is None:
        known = ", ".join(f"{each:.3g}" for each in reached)
        raise PlanError(
            f"No plan is within a visual budget of {budget:g}; there are {known}.",
            remedy="Pass one of these with --budget.",
        )
    return place


def _command(
    targets: tuple[str, ...],
    evaluations: tuple[Path, ...],
    bench: Path | None,
    budget: float | None,
    output: str,
) -> str:
    """The command line, as it can be typed again."""
    words = ["yopo", "report", *targets]
    for path in evaluations:
        words += ["--eval", str(path)]
    words += [] if bench is None else ["--bench", str(bench)]
    words += [] if budget is None else ["--budget", f"{budget:g}"]
    return shlex.join([*words, "-o", output])
