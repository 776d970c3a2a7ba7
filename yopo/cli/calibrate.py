"""``yopo calibrate``: measure a model on pairs once and write the plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yopo.cli.command import SharedCommand, load
from yopo.cli.config import config_option
from yopo.cli.next_step import suggest_next
from yopo.cli.options import (
    check_settings,
    data_option,
    force_option,
    plan_request,
    request_options,
    run_options,
    run_settings,
)
from yopo.cli.results import Keeper, check_outputs, save
from yopo.cli.values import Listed, Number, Share
from yopo.pipeline.opening import check_named
from yopo.reduction.registry import parse_choice

if TYPE_CHECKING:
    from yopo.pipeline.session import Calibrated


def _named(output: str, budget: float | None) -> str:
    """The plan file for one of several budgets."""
    if budget is None:
        return output
    if output == "-":
        raise click.UsageError("--budgets writes several plans: give a file name with -o.")
    path = Path(output)
    return str(path.with_name(f"{path.stem}-{budget:g}{path.suffix}"))


def _show_status(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is None or context.resilient_parsing:
        return
    for line in load("yopo.pipeline.work_status").status_of(value):
        click.echo(line)
    context.exit()


@click.command(cls=SharedCommand)
@click.option("--model", required=True, help="Alias, hub id org/name[@revision], or directory.")
@data_option("demo:calibration, or their task's")
@run_options
@request_options
@click.option(
    "--queries",
    type=click.Choice(("text", "all", "last")),
    default="text",
    show_default=True,
    help="Queries that head activity sums over.",
)
@click.option(
    "--measure-pairs",
    type=click.IntRange(min=8),
    metavar="N",
    default=64,
    show_default=True,
    help="Held-out pairs to compare plans on: at most a quarter; nothing is fitted on them.",
)
@click.option(
    "--fit-pairs",
    type=click.IntRange(min=8),
    metavar="N",
    default=256,
    show_default=True,
    help="Maximum number of the other pairs to fit visual weights on.",
)
@click.option(
    "--grids",
    metavar="S,S,...",
    type=Listed(Number()),
    help="Resize images by these factors, pairs in turn, for plans that hold on several sizes.  "
    "[default: 1]",
)
@click.option(
    "--reduce",
    metavar="NAME:SHARE",
    help="Keep this share of every image's tokens before the first layer, chosen by a method "
    "(par, divprune, ...), and plan what is left, e.g. par:0.5. Without a share: the best of "
    "several, no reduction among them.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="plan.yaml",
    show_default=True,
    help="The plan; - for stdout.",
)
@click.option("--costs", metavar="FILE", help="Output of `yopo bench --json`, for --milliseconds.")
@click.option(
    "--budgets",
    metavar="F,F,...",
    type=Listed(Share()),
    help="One plan per budget: FILE-0.12.yaml, ... to pass to one `yopo apply` together.",
)
@click.option(
    "--stats", type=click.Path(path_type=Path), metavar="FILE", help="Save the statistics here."
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep finished stages here: if it is killed, the same command goes on where it was. Where "
    "decoder layers stay on disk, what waits does so here instead of in host memory.",
)
@click.option(
    "--status",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    is_eager=True,
    expose_value=False,
    callback=_show_status,
    help="Show how far the calibration in a --work-dir is, and exit.",
)
@config_option()
@force_option
@click.pass_context
def command(context: click.Context, **values: Any) -> None:
    """Measure a model on image-question pairs once, and write a plan.

    The plan either meets a visual budget (--budget: several templates are measured, the best one
    wins), or follows the paper (--preset, or its parameters, from --head-ratio to --alpha).
    """
    output, stats, force = values["output"], values["stats"], values["force"]
    outputs = {budget: _named(output, budget) for budget in values["budgets"] or (None,)}
    if (values["milliseconds"] is None) != (values["costs"] is None):
        raise click.UsageError("--milliseconds and --costs need each other.")
    check_outputs(outputs.values(), stats, force=force)
    costs = values["costs"]
    requests = [plan_request(context, costs=costs, budget=each) for each in outputs]
    if not values["data"]:
        check_named(values["model"], "calibration")
    check_settings(context)
    commands, pipeline = load("yopo.pipeline.commands"), load("yopo.pipeline.options")
    counts = (values["measure_pairs"], values["fit_pairs"])
    grids = tuple(values["grids"] or (1.0,))
    reduction, shares = parse_choice(values["reduce"]) if values["reduce"] else (None, ())
    fit_options = pipeline.FitOptions(
        values["queries"], *counts, grids, reduction, shares, values["work_dir"]
    )
    keeper = Keeper(stats, force=force)
    how = {
        "options": run_settings(context),
        "fit_options": fit_options,
        "keep": keeper.keep,
    }
    ranks = load("yopo.support.ranks")
    with ranks.together(how["options"].device), keeper.guarding():
        if not values["budgets"]:
            made: Calibrated = commands.calibrate(values["model"], requests[0], **how)
            save(made, output, force=force)
            suggest_next("apply", output, then=", or `yopo inspect` to see what it prunes")
            return
        for each in commands.calibrate_front(values["model"], requests, **how):
            save(each, outputs[each.plan.budget.asked], force=force)
    together = [outputs[each] for each in sorted(values["budgets"], reverse=True)]
    suggest_next("apply", *together, then=" bakes them into one checkpoint")
