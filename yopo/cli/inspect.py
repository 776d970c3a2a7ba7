"""``yopo inspect``: shows what a plan prunes and saves, as tables, JSON or HTML."""

from __future__ import annotations

from pathlib import Path

import click

from yopo.cli.command import Command
from yopo.cli.next_step import suggest_next
from yopo.cli.options import force_option
from yopo.support.files import PAGE, check_writable, write_file


@click.command(cls=Command)
@click.argument("plan")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
@click.option(
    "--html", "page", type=click.Path(path_type=Path), help="Write a page instead of printing."
)
@force_option
def command(plan: str, as_json: bool, page: Path | None, force: bool) -> None:
    """Show what PLAN (a file, or - for stdin) prunes, layer by layer, and what that saves."""
    from yopo.plans.file import read_document

    if as_json and page is not None:
        raise click.UsageError("--json and --html exclude one another.")
    if page is not None:
        check_writable(page, PAGE, force=force)
    found, _ = read_document(plan)
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
    suggest_next("apply", plan)
