"""``yopo pairs``: writes demo pairs to files, as examples of the data format."""

from __future__ import annotations

from pathlib import Path

import click

from yopo.cli.command import Command
from yopo.cli.next_step import suggest_next
from yopo.demo import SETS, model_of_set
from yopo.support.console import note
from yopo.support.errors import OutputError
from yopo.support.scratch import Scratch, report_leftovers


@click.command(cls=Command)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--split",
    type=click.Choice(SETS),
    default="heldout",
    show_default=True,
    help="Scenes of shapes, grids of glyphs, or tickets; no image is in two splits.",
)
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", default=64, show_default=True, help="Pairs."
)
@click.option(
    "--seed", type=int, metavar="N", default=0, show_default=True, help="Seed of the pairs."
)
def command(directory: Path, split: str, count: int, seed: int) -> None:
    """Write demo pairs to DIRECTORY: images, and pairs.jsonl with one line per question.

    Your own pairs need the same format: {"image": PATH, "question": TEXT, "answer": TEXT}, with
    paths relative to the file; the answer is optional. Prints the path of pairs.jsonl.
    """
    from yopo.demo.pair_files import PAIRS_NAME, write_pairs

    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise OutputError(f"{directory}: exists already.", remedy="Name a new directory.")
    parent = directory.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{directory}: its folder does not exist.")
    report_leftovers(directory.absolute())
    with Scratch(directory.absolute()) as scratch:
        write_pairs(scratch.new, split, count, seed=seed)
        scratch.place_directory(check=lambda: False)  # an empty directory is replaced by a rename
    note(f"Wrote {count} pairs of the split '{split}'.")
    click.echo(directory / PAIRS_NAME)
    suggest_next("calibrate", "--model", model_of_set(split), "--data", directory / PAIRS_NAME)
