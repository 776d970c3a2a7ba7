"""``yopo compare``: several plans or checkpoints side by side."""

from __future__ import annotations

from pathlib import Path

import click

from yopo.cli.command import Command
from yopo.cli.next_step import suggest_next
from yopo.cli.options import force_option
from yopo.support.files import PAGE, check_writable, write_file

MOST = 8
"""Plans that fit side by side."""


@click.command(cls=Command)
@click.argument("targets", nargs=-1, metavar="A B...")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
@click.option(
    "--html", "page", type=click.Path(path_type=Path), help="Write a page instead of printing."
)
@force_option
def command(targets: tuple[str, ...], as_json: bool, page: Path | None, force: bool) -> None:
    """Compare plans (files, or - for stdin) and checkpoints that `yopo apply` wrote.

    Shows what each saves (visual FLOPs, prefill, KV cache), how far each was measured to stray from
    the dense model, in all and by kind of pair, and in which layers they differ. A checkpoint with
    several budgets is compared as all of its plans.
    """
    from yopo.plans.places import read_all
    from yopo.report.compare import check_comparable, comparison_document, comparison_report

    if as_json and page is not None:
        raise click.UsageError("--json and --html exclude one another.")
    if page is not None:
        check_writable(page, PAGE, force=force)
    plans = read_all(targets)
    if not 2 <= len(plans) <= MOST:
        raise click.UsageError(f"Give 2 to {MOST} plans or checkpoints, found {len(plans)}.")
    check_comparable(plans)
    if as_json:
        from yopo.cli.output import print_json

        print_json(comparison_document(plans))
        return
    from yopo.cli.output import html, print_report

    if page is None:
        print_report(comparison_report(plans))
    else:
        write_file(page, html(comparison_report(plans), title="yopo compare").encode())
    suggest_next("eval", targets[0], "--data", "PAIRS")
