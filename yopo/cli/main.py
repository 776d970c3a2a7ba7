"""The entry point ``yopo``.

stdout carries results, stderr everything else. Exit codes: 0 done, 1 failed, 2 wrong usage,
130 interrupted. Nothing but the standard library is imported before signals are in hand.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from yopo.cli.interrupts import catching


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: Without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    with catching():
        try:
            from yopo.cli.group import run

            return run(arguments)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
