"""The command ``yopo``: runs the subcommand, and turns every failure into a sentence."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click

from yopo.cli import interrupts
from yopo.cli.command import LazyGroup
from yopo.cli.verbosity import Verbosity
from yopo.support import launched
from yopo.support.errors import YopoError, printable
from yopo.support.out_of_memory import is_out_of_memory
from yopo.support.version import __version__

COMMANDS = {
    "calibrate": ("yopo.cli.calibrate", "Measure a model on pairs and write a plan."),
    "search": ("yopo.cli.search", "Calibrate, and improve the plan layer by layer."),
    "plan": ("yopo.cli.plan", "Make another plan from saved statistics."),
    "inspect": ("yopo.cli.inspect", "Show what a plan prunes and what that saves."),
    "compare": ("yopo.cli.compare", "Show plans or checkpoints side by side."),
    "apply": ("yopo.cli.apply", "Bake a plan into a checkpoint."),
    "eval": ("yopo.cli.eval", "Compare the pruned model with the dense one."),
    "bench": ("yopo.cli.bench", "Time the pruned model against the dense one."),
    "report": ("yopo.cli.report", "Write a page on plans: what they save and what they lose."),
    "convert": ("yopo.cli.convert", "Convert an original InternVL2 checkpoint to a native one."),
    "pairs": ("yopo.cli.pairs", "Write demo pairs, as examples of the data format."),
}

SETTINGS = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@click.group(cls=LazyGroup, modules=COMMANDS, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="yopo", message="%(prog)s %(version)s")
def cli() -> None:
    """You only prune once: find what visual tokens need, and skip the rest.

    \b
    yopo calibrate --model llava-tiny   measure once, write plan.yaml
    yopo inspect plan.yaml              see what would be pruned, and what it saves
    yopo apply plan.yaml                bake it into a checkpoint for yopo.load(...)
    """


def run(arguments: Sequence[str] | None) -> int:
    """Run a command line and report any failure in a sentence.

    Args:
        arguments: Without the program's name; None means those of the process.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: A signal arrived, in whatever form a library passed it on.
    """
    verbosity = Verbosity()
    launched.hush()
    _never_fail_to_encode()
    try:
        code = cli.main(arguments, prog_name="yopo", standalone_mode=False, obj=verbosity)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except click.ClickException as error:
        if launched.speaks():
            error.show()
        return error.exit_code
    except BrokenPipeError:  # the reader closed the pipe
        sys.stdout = open(os.devnull, "w")
        return 1
    except Exception as error:
        if verbosity.shows_tracebacks:
            traceback.print_exc()
        interrupts.raise_if_arrived()
        return _explain(error)


def _explain(error: Exception) -> int:
    message, remedy, code = _sentence(error)
    if not launched.speaks():
        return code
    if isinstance(error, launched.ProcessLost):
        message, remedy = launched.loss(is_sure=True) or message, None
    click.echo(click.style("error: ", fg="red", bold=True) + printable(message), err=True)
    if remedy:
        click.echo(f"  {remedy}", err=True)
    return code


def _sentence(error: Exception) -> tuple[str, str | None, int]:
    """(message, remedy, exit code) of any failure."""
    if isinstance(error, YopoError):
        return error.message, error.remedy, error.exit_code
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}disk full.", "Free some space, or write to another file system.", 1
    if is_out_of_memory(error):
        return "Out of memory.", "Use a smaller --batch-size, or --dtype bfloat16.", 1
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}.", None, 1
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 300 else f"{reason[:297]}..."
    message = f"unexpected error: {type(error).__name__}: {reason.rstrip('.')}"
    return f"{message}; run with -vv for the traceback.", None, 1


def _never_fail_to_encode() -> None:
    """Print a question mark instead of failing if the terminal's encoding lacks a character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
