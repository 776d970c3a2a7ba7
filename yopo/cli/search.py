"""``yopo search``: calibrates, then improves the plan layer by layer while the KL falls."""

from __future__ import annotations

from copy import copy

import click

from yopo.cli.calibrate import command as calibrate
from yopo.cli.options import SEARCH_RUNS

_HELP = """Calibrate, then improve the best plan layer by layer while the measured KL falls.

Same as `yopo calibrate --search`, with all of its options: every step changes the weight of one
layer, reallocates the budget, and is kept only if it lowers the KL on the comparison pairs.
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
