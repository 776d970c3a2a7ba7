"""The entry point ``yopo``.

stdout carries results, stderr everything else. Exit codes: 0 done, 1 failed, 2 wrong usage,
128 plus its number for a signal (130: Ctrl-C). Only the standard library is imported before signal
handlers are installed.
"""

from __future__ import annotations

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
            word, code = outcome()
            with suppress(OSError):  # the terminal is gone
                print(word, file=sys.stderr, flush=True)
            return code


if __name__ == "__main__":
    sys.exit(main())
