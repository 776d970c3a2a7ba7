"""``yopo apply``: bake a plan into a checkpoint; the directory's path goes to stdout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yopo.cli.command import Command, load
from yopo.cli.next_step import YOURS, suggest_next
from yopo.cli.options import force_option
from yopo.support.console import note, show
from yopo.support.errors import OutputError

if TYPE_CHECKING:
    from yopo.pipeline.commands import Applied


@click.command(cls=Command)
@click.argument("plans", nargs=-1, metavar="PLAN...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory to create.  [default: NAME-yopo in the working directory]",
)
@click.option("--model", help="The checkpoint, if not where the plan says.")
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Record this result of `yopo eval PLAN --json` in the (first) plan and the model card.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@click.option("--verify", is_flag=True, help="Open the result and compare it with the original.")
@click.option(
    "--clean",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Instead: remove leftovers of killed runs next to DIR and in it.",
)
@force_option
def command(
    plans: tuple[str, ...], dry_run: bool, verify: bool, clean: Path | None, **values: Any
) -> None:
    """Bake PLAN (a file, or - for stdin) into a copy of its model's checkpoint.

    The copy loads in stock transformers as the original model, and with yopo.load as the pruned
    one. It appears complete or not at all. Prints its path. Several plans from one calibration can
    be baked together: yopo.load(DIR) uses the first, yopo.load(DIR, budget=0.12) the largest within
    a budget.
    """
    if clean is not None:
        if plans:
            raise click.UsageError("--clean and PLAN exclude one another.")
        _clean(clean)
        return
    if not plans:
        raise click.UsageError("Missing argument 'PLAN...'.")
    if dry_run and verify:
        raise click.UsageError("--dry-run and --verify exclude one another.")
    done: Applied = load("yopo.pipeline.commands").apply(
        *plans,
        output=values["output"],
        model=values["model"],
        evaluation=values["evaluation"],
        force=values["force"],
        dry_run=dry_run,
        check=verify,
    )
    _report(done)
    if not dry_run:
        click.echo(done.report.output)
        suggest_next("eval", done.report.output, "--data", YOURS)


def _clean(place: Path) -> None:
    """Remove leftovers of killed runs for a target, and for targets in it if it is a directory."""
    from yopo.support.scratch import find_leftovers, remove_leftover

    place = place.absolute()
    if not place.parent.is_dir():
        raise OutputError(f"{place}: its folder does not exist.")
    found = find_leftovers(place.parent, place.name)
    found += find_leftovers(place) if place.is_dir() else []
    for path in found:
        try:
            restored = remove_leftover(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be removed: {error.strerror}.") from error
        if restored is not None:
            note(f"{restored}: restored.")
        click.echo(path)
    note(f"Removed {len(found)} leftovers of killed runs." if found else "Nothing to remove.")


def _report(done: Applied) -> None:
    from yopo.report import units
    from yopo.report.plan_tables import savings_table

    report, found = done.report, done.verification
    show(savings_table(done.plan))
    size = units.num_bytes(report.num_bytes)
    verb = "would be written (dry run)" if report.plan is None else "written"
    note(
        f"{report.output}: {size} in {report.num_tensors} tensors "
        f"({report.num_reordered} reordered) {verb}."
    )
    if found is not None:
        note(
            f"Verified in {found.dtype}: stock transformers deviates by "
            f"{found.dense.relative:.0e} from the original,",
            f"  yopo.load by {found.pruned.relative:.0e} from the plan in memory "
            f"(rounding: up to {found.tolerance:.0e}); no weight is missing.",
        )
