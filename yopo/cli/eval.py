"""``yopo eval``: compares the pruned model with the dense one: quality kept, work saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yopo.cli.command import Command, load
from yopo.cli.next_step import suggest_next
from yopo.cli.options import (
    check_settings,
    data_option,
    force_option,
    run_options,
    run_settings,
)
from yopo.cli.values import Share
from yopo.demo import demo_data
from yopo.support.files import EVALUATION, check_writable, write_file

if TYPE_CHECKING:
    from yopo.evaluation.evaluate import Evaluation

EXAMPLES = 12
"""Examples in a file, unless told otherwise."""


@click.command(cls=Command)
@click.argument("target")
@data_option("demo:heldout, or their task's")
@run_options
@click.option("--model", help="The dense model, if not where the plan says.")
@click.option(
    "--timing-runs",
    type=click.IntRange(min=0),
    metavar="N",
    default=15,
    show_default=True,
    help="Paired prefill runs; 0 skips timing.",
)
@click.option(
    "--budget",
    type=Share(),
    metavar="F",
    help="Of the plans baked into TARGET, the largest within F.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write this JSON document as well, for `yopo report` and `yopo apply --eval`.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    metavar="N",
    help="Pairs in the JSON document with their images, both answers, and where the text looks, "
    f"those with different answers first.  [default: {EXAMPLES} with -o, else 0]",
)
@force_option
@click.pass_context
def command(context: click.Context, target: str, as_json: bool, **values: Any) -> None:
    """Compare the pruned model of TARGET with the dense one on the same pairs.

    TARGET is what `yopo apply` wrote (a directory or hub id), a plan, or - for a plan on stdin.
    Accuracy is measured if the pairs have answers; agreement is measured along the dense model's
    answers. Both are reported per kind of question as well, with the worst kind marked.
    """
    from yopo.cli.output import json_text, print_json, print_report

    output, examples = values["output"], values["examples"]
    if output is not None:
        check_writable(output, EVALUATION, force=values["force"])
    if examples is None:
        examples = 0 if output is None else EXAMPLES
    check_settings(context)
    found: Evaluation = load("yopo.pipeline.commands").evaluate(
        target,
        options=run_settings(context),
        model=values["model"],
        timing_runs=values["timing_runs"],
        budget=values["budget"],
        examples=examples,
    )
    if output is not None:
        write_file(output, json_text(found.to_dict()).encode())
    if as_json:
        print_json(found.to_dict())
    else:
        from yopo.report.evaluation import evaluation_report

        names = values["data"] or (demo_data(found.plan.model.name, "heldout"),)
        shown = " + ".join(Path(name).name if Path(name).exists() else name for name in names)
        print_report(evaluation_report(found, shown))
        if output is not None:
            suggest_next("report", target, "--eval", output)
        elif Path(target).is_file():
            suggest_next("apply", target)
        else:
            suggest_next("bench", target)
