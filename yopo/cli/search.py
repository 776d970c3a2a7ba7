"""``yopo search``: calibrate, and go on layer by layer as long as the measured KL falls."""

from __future__ import annotations

from copy import copy

import click

from yopo.cli.calibrate import command as calibrate
from yopo.cli.options import SEARCH_RUNS

_HELP = """Calibrate, then improve the best plan layer by layer, as long as the measured KL falls.

As `yopo calibrate --search`, with all of its options: every step changes what one layer is worth,
allocates the budget again, and is kept only if the plan strays less on the measured pairs.
"""


def _searching(calibrate: click.Command) -> click.Command:
    """The same command, with another name and a search unless told otherwise."""
    command = copy(calibrate)
    command.name, command.help = "search", _HELP
    command.params = [copy(each) for each in calibrate.params]
    for each in command.params:
        if each.name == "search":
            each.default = SEARCH_RUNS
    return command


command = _searching(calibrate)
