"""``yopo inspect``: shows what a plan prunes and saves, as tables, JSON or HTML."""

from __future__ import annotations

from pathlib import Path

import click

from yopo.cli.command import Command
from yopo.cli.next_step import YOURS, suggest_next
from yopo.cli.options import force_option
from yopo.cli.values import Share
from yopo.support.console import note
from yopo.support.files import PAGE, check_writable, write_file


@click.command(cls=Command)
@click.argument("plan", metavar="PLAN_OR_DIR")
@click.option(
    "--budget",
    type=Share(),
    metavar="F",
    help="Of the plans baked into DIR, the largest within F.  [default: the first]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
@click.option(
    "--html", "page", type=click.Path(path_type=Path), help="Write a page instead of printing."
)
@force_option
def command(plan: str, budget: float | None, as_json: bool, page: Path | None, force: bool) -> None:
    """Show what a plan prunes, layer by layer, what that saves, and what it was measured to lose.

    The plan is a file, - for stdin, or inside DIR, which `yopo apply` wrote.
    """
    from yopo.plans.places import plan_files_in, read_any

    if as_json and page is not None:
        raise click.UsageError("--json and --html exclude one another.")
    if page is not None:
        check_writable(page, PAGE, force=force)
    found = read_any(plan, budget)
    if as_json:
        from yopo.cli.output import print_json
        from yopo.report.json import plan_document

        print_json(plan_document(found))
        return
    from yopo.cli.output import html, print_report
    from yopo.report.summary import plan_report

    if page is None:
        print_report(plan_report(found))
    else:
        write_file(page, html(plan_report(found), title=found.model.name).encode())
    if plan == "-" or not Path(plan).is_dir():
        suggest_next("apply", plan)
        return
    files = plan_files_in(Path(plan))
    if len(files) > 1 and budget is None:
        reached = (read_any(str(file)).budget.reached for file in files)
        listed = ", ".join(f"{each:.1%}" for each in reached)
        note(f"{plan}: holds plans at {listed} of the visual FLOPs (--budget F).")
    suggest_next("eval", plan, "--data", YOURS)
