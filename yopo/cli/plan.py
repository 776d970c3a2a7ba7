"""``yopo plan``: makes another plan from saved statistics, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from yopo.cli.command import Command, load
from yopo.cli.next_step import suggest_next
from yopo.cli.options import force_option, plan_request, request_options
from yopo.cli.results import check_outputs, save


@click.command(cls=Command)
@click.argument("stats", type=click.Path(path_type=Path))
@request_options
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="plan.yaml",
    show_default=True,
    help="The plan; - for stdout.",
)
@force_option
@click.pass_context
def command(context: click.Context, stats: Path, **values: Any) -> None:
    """Make another plan from STATS, which `yopo calibrate --stats` saved, without the model.

    Nothing can be measured without the model: a budget uses --template, or `reader-heads`.
    """
    check_outputs([values["output"]], None, force=values["force"])
    made = load("yopo.pipeline.commands").plan(stats, plan_request(context))
    save(made, values["output"], force=values["force"])
    suggest_next("apply", values["output"], then=", or `yopo inspect` to see what it prunes")
