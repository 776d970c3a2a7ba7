"""``yopo convert``: makes an original InternVL checkpoint native; its path goes to stdout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from yopo.cli.command import Command, load
from yopo.cli.next_step import YOURS, suggest_next
from yopo.cli.options import force_option
from yopo.support.console import note

if TYPE_CHECKING:
    from yopo.conversion.internvl import Conversion


@click.command(cls=Command)
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@force_option
def command(source: str, output: Path, force: bool) -> None:
    """Write SOURCE (an alias, directory or hub id) to the directory OUTPUT as a native checkpoint.

    For InternVL2, whose own code does not run on transformers 5. Anything unknown is refused, not
    guessed. No model is loaded; the result appears complete or not at all. Prints its path.
    """
    found = load("yopo.models.registry").resolve(source)
    folder = load("yopo.checkpoint.reader").fetch(found, takes_original=True)
    done: Conversion = load("yopo.conversion.internvl").convert(folder, output, force=force)
    _report(done)
    click.echo(done.output)
    suggest_next("calibrate", "--model", done.output, "--data", YOURS)


def _report(done: Conversion) -> None:
    from yopo.report import units

    size = units.num_bytes(done.num_bytes)
    note(f"{done.output}: {size} in {done.num_tensors} tensors written.")
    for sentence in done.notes:
        note(f"  {sentence}")
