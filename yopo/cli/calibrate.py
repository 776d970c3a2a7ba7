"""``yopo calibrate``: measure a model on pairs once, write the plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yopo.cli.command import Command, load
from yopo.cli.config import config_option
from yopo.cli.options import (
    DATA_FORMS,
    force_option,
    run_options,
    run_settings,
    wish_options,
    wishes,
)
from yopo.cli.results import check_outputs, save

if TYPE_CHECKING:
    from yopo.workflow import Calibrated


@click.command(cls=Command)
@click.option("--model", required=True, help="Alias, hub id org/name[@revision], or directory.")
@click.option("--data", help=f"Pairs: {DATA_FORMS}  [default: demo:calibration, or glyphs]")
@run_options
@wish_options
@click.option(
    "--queries",
    type=click.Choice(("text", "all", "last")),
    default="text",
    show_default=True,
    help="Which queries head activity sums over.",
)
@click.option(
    "--measure-pairs",
    type=click.IntRange(min=1),
    metavar="N",
    default=64,
    show_default=True,
    help="Pairs on which plan shapes are compared.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="plan.yaml",
    show_default=True,
    help="The plan; - for stdout.",
)
@click.option(
    "--stats", type=click.Path(path_type=Path), metavar="FILE", help="Save the statistics here."
)
@config_option()
@force_option
@click.pass_context
def command(context: click.Context, **values: Any) -> None:
    """Measure a model on image-question pairs once, and write a plan.

    The plan either meets a visual budget (--budget: several plan shapes are measured, the best
    one wins), or has the paper's shape (--preset, or its knobs, from --head-ratio to --alpha).
    """
    check_outputs(values["output"], values["stats"], force=values["force"])
    made: Calibrated = load("yopo.workflow").calibrate(
        values["model"],
        wishes(context),
        run_settings(context),
        queries=values["queries"],
        measure_pairs=values["measure_pairs"],
    )
    save(made, values["output"], stats=values["stats"], force=values["force"])
