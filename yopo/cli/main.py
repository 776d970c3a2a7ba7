"""The entry point ``yopo``.

stdout carries results, stderr everything else. Exit codes: 0 done, 1 failed, 2 wrong usage,
128 plus its number for a signal (130: Ctrl-C). Only the standard library is imported before signal
handlers are installed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from yopo.cli.interrupts import catching, outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: Without the program's name; None means those of the process.

    Returns:
        The exit code.
    """
    with catching():
        try:
            from yopo.cli.group import run

            return run(arguments)
        except KeyboardInterrupt:
            return _interrupted()


def _interrupted() -> int:
    """Print one word, or what another process did that ``torchrun`` ends this one for."""
    from yopo.support import launched

    word, code = outcome()
    if not launched.speaks():
        return code
    loss = launched.loss()
    if loss is None and launched.processes() > 1 and code == 128 + signal.SIGTERM:
        word += " by torchrun, which was told to end, or lost another process as it started"
    with suppress(OSError):  # the terminal is gone
        print(word if loss is None else f"error: {loss}", file=sys.stderr, flush=True)
    return code if loss is None else 1


if __name__ == "__main__":
    sys.exit(main())
