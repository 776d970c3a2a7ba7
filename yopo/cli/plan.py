"""``yopo plan``: makes another plan from saved statistics, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from yopo.cli.command import Command, load
from yopo.cli.next_step import suggest_next
from yopo.cli.options import force_option, plan_request, request_options
from yopo.cli.results import check_outputs, save, written
from yopo.support.console import note


@click.command(cls=Command)
@click.argument("stats", type=click.Path(path_type=Path), required=False)
@request_options
@click.option(
    "--shape-of",
    metavar="NAME",
    help="No STATS, with --preset: a plan to time of llava-1.5-7b's or llava-1.5-13b's shape.",
)
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
def command(context: click.Context, stats: Path | None, **values: Any) -> None:
    """Make another plan from STATS, which `yopo calibrate --stats` saved, without the model.

    Nothing can be measured without the model: a budget uses --template, or `reader-heads`.

    Without STATS, a preset of a published shape: a plan whose heads and neurons were not measured.
    It can be timed (`yopo bench plan.yaml --random-weights`), but not applied.

    \b
    yopo plan --preset yopo-25 --shape-of llava-1.5-7b
    """
    if (stats is None) == (values["shape_of"] is None):
        raise click.UsageError("Give either STATS or --shape-of.")
    check_outputs([values["output"]], None, force=values["force"])
    if stats is None:
        _write_shape(context, values)
        return
    made = load("yopo.pipeline.commands").plan(stats, plan_request(context))
    save(made, values["output"], force=values["force"])
    suggest_next("apply", values["output"], then=", or `yopo inspect` to see what it prunes")


def _write_shape(context: click.Context, values: dict[str, Any]) -> None:
    given = click.core.ParameterSource.DEFAULT
    allowed = ("stats", "shape_of", "preset", "output", "force")
    more = [
        name
        for name in context.params
        if name not in allowed and context.get_parameter_source(name) != given
    ]
    if values["preset"] is None or more:
        raise click.UsageError("--shape-of needs --preset, and takes no other request.")
    made = load("yopo.bench.random_model").published_plan(values["preset"], values["shape_of"])
    load("yopo.plans.storage").write_plan(made, values["output"], force=values["force"])
    note(written(made, values["output"]))
    suggest_next("bench", values["output"], "--random-weights")
