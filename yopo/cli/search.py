"""``yopo search``: calibrates, then measures more variations of the best plan."""

from __future__ import annotations

from copy import copy

import click

from yopo.cli.calibrate import command as calibrate
from yopo.cli.options import SEARCH_RUNS

_HELP = """Calibrate, then measure more variations of the best plan, and keep what lowers its KL.

Same as `yopo calibrate --search`, with all of its options. An allocation is varied in all layers at
once, a template in one layer at a time; the KL is that on the comparison pairs.
"""


def _searching(calibrate: click.Command) -> click.Command:
    """The same command with another name, and with a search by default."""
    command = copy(calibrate)
    command.name, command.help = "search", _HELP
    command.params = [copy(each) for each in calibrate.params]
    for each in command.params:
        if each.name == "search":
            each.default = SEARCH_RUNS
    return command


command = _searching(calibrate)
