"""Shared by all commands: ``-v`` and ``-q`` before or after the command's name, lazy loading."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import click

from yopo.cli import interrupts
from yopo.cli.help_groups import write_options
from yopo.cli.verbosity import Verbosity, applied
from yopo.support import launched
from yopo.support.errors import suggest


def _count_verbose(context: click.Context, parameter: click.Parameter, value: int) -> None:
    context.ensure_object(Verbosity).verbose += value


def _set_quiet(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.ensure_object(Verbosity).quiet |= value


def _verbosity_options() -> list[click.Option]:
    return [
        click.Option(
            ["-v", "--verbose"],
            count=True,
            expose_value=False,
            callback=_count_verbose,
            help="Show all candidates and messages of libraries; -vv shows tracebacks.",
        ),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_set_quiet,
            help="Hide notes and progress; show only results, warnings and errors.",
        ),
    ]


def load(module: str) -> ModuleType:
    """Import a module when a command needs it; torch and transformers take seconds.

    Raises:
        KeyboardInterrupt: Even if a library swallowed it during its import.
    """
    loaded = importlib.import_module(module)
    interrupts.raise_if_arrived()
    return loaded


class Command(click.Command):
    """A command that takes ``-v`` and ``-q`` and keeps the libraries quiet while it runs."""

    is_shared = False
    """Whether several processes, started by ``torchrun``, can share its work."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params += _verbosity_options()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options, in groups if there are many."""
        if not write_options(ctx, self, formatter):
            super().format_options(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            UsageError: Several processes are to run it, and it runs in one.
        """
        if launched.processes() > 1 and not self.is_shared:
            raise click.UsageError(
                f"`yopo {ctx.info_name}` runs in one process, not in {launched.processes()}: start "
                "it without torchrun. Only `calibrate` and `search` share their work.",
                ctx,
            )
        with applied(ctx.ensure_object(Verbosity)):
            return super().invoke(ctx)


class SharedCommand(Command):
    """A command whose work several processes can share."""

    is_shared = True

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, of which the other processes know where."""
        if launched.processes() > 1:
            launched.present()
        return super().invoke(ctx)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used.

    Args:
        modules: Command name -> (module that holds ``command``, one line of help).
    """

    def __init__(self, *args: Any, modules: dict[str, tuple[str, str]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.modules = modules
        self.params += _verbosity_options()

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of use, not alphabetically."""
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if it does not exist."""
        if cmd_name not in self.modules:
            return None
        return importlib.import_module(self.modules[cmd_name][0]).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or suggest one."""
        if args[0] not in self.modules and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{args[0]}'. {suggest(args[0], self.modules)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.modules.items()])
